// AVX-512 (Skylake-X, Zen 4 and newer).
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if !defined(__clang__)
// GCC's own intrinsics read an operand that they leave undefined on purpose (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define FASTLORA_ISA isa_avx512
#define FASTLORA_ISA_TABLE avx512
#define FASTLORA_VECTOR_BYTES 64
#define FASTLORA_REGISTERS 32
#define FASTLORA_TILE_ROWS 8
#define FASTLORA_X86_FMA
#define FASTLORA_X86_AVX512
#include "stages.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
