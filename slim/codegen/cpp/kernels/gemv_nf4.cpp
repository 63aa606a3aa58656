#include "gemv_packed.h"

namespace slim {

void gemv_nf4(const GemvRun& run) { gemv_bytes<Nf4Code>(run); }

}  // namespace slim
