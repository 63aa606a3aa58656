#include "gemv_packed.h"

namespace slim {

void gemv_int4(const GemvRun& run) { gemv_nibbles<Int4Code>(run); }

}  // namespace slim
