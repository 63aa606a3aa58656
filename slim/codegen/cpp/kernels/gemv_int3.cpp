#include "gemv_packed.h"

namespace slim {

void gemv_int3(const GemvRun& run) { gemv_nibbles<Int3Code>(run); }

}  // namespace slim
