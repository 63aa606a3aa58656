#include "gemv_packed.h"

namespace slim {

void gemv_int8(const GemvRun& run) { gemv_bytes<Int8Code>(run); }

}  // namespace slim
