// What every machine of this architecture has: SSE2 on x86-64, NEON on AArch64.
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define FASTLORA_ISA isa_baseline
#define FASTLORA_ISA_TABLE baseline
#define FASTLORA_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTLORA_REGISTERS 32
#else
#define FASTLORA_REGISTERS 16
#endif
#define FASTLORA_TILE_ROWS 4
#include "stages.inc"
