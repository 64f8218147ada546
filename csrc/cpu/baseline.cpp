// What every machine of this architecture has: SSE2 on x86-64, NEON on AArch64.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#define FASTLORA_ISA isa_baseline
#define FASTLORA_ISA_TABLE baseline
#define FASTLORA_VECTOR_BYTES 16
#define FASTLORA_TILE_ROWS 4
#include "stages.inc"
