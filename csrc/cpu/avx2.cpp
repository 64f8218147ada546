// AVX2 and FMA (Haswell, Zen and newer).
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTLORA_ISA isa_avx2
#define FASTLORA_ISA_TABLE avx2
#define FASTLORA_VECTOR_BYTES 32
#define FASTLORA_REGISTERS 16
#define FASTLORA_TILE_ROWS 4
#define FASTLORA_X86_FMA
#include "stages.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
