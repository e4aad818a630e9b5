// One vector of floats and what experts need of it, for whatever instruction set this file is compiled for.
//
// GCC's vector types stand for the registers, so that every path is the same source: LANES floats a vector, intrinsics only
// where a type has no operation for it. EMULATED compiles a path without its instructions, to test it on any machine.

#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__) && !defined(EMULATED)
#include <immintrin.h>
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

// Whether there is one instruction for pairs of bfloat16.
#if defined(__AVX512BF16__) && !defined(PAIRS)
#define PAIRS
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef int8_t vb __attribute__((vector_size(LANES)));

template <class V>
INLINE V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
}

INLINE long up_to(long n, long unit) { return (n + unit - 1) / unit * unit; }
INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE vf broadcast(float x) { return x - (vf){}; }

INLINE vf widen_half(vh h) {
#if defined(__AVX512F__) && LANES == 16 && !defined(EMULATED)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && LANES == 8 && !defined(EMULATED)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    vu bits = __builtin_convertvector(h, vu);
    vu sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    vf scaled = (vf)rest * 0x1p112f;  // exact for subnormal halves too
    vu special = (vu)((vi)rest >= (vi)(vu)(0x7c00u << 13 | (vu){}));
    return (vf)(((special & (rest | 0x7f800000u)) | (~special & (vu)scaled)) | sign);
#endif
}

// In one step GCC 12 converts number by number.
INLINE vf widen_int8(vb b) {
#if defined(__AVX512F__) && LANES == 16 && !defined(EMULATED)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#elif defined(__AVX2__) && LANES == 8 && !defined(EMULATED)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)b)));
#else
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

enum Dtype { FLOAT32, BFLOAT16, FLOAT16, INT8 };

INLINE long size_of(long dtype) { return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2; }

// Number i of a tensor of floats.
INLINE float to_float(const void* p, long i, long dtype) {
    if (dtype == FLOAT32) return ((const float*)p)[i];
    vu bits = {((const uint16_t*)p)[i]};
    return dtype == BFLOAT16 ? ((vf)(bits << 16))[0] : widen_half(__builtin_convertvector(bits, vh))[0];
}

// LANES of them.
INLINE vf to_floats(const void* p, long i, long dtype) {
    if (dtype == FLOAT32) return load<vf>((const float*)p + i);
    vh bits = load<vh>((const uint16_t*)p + i);
    return dtype == BFLOAT16 ? (vf)(__builtin_convertvector(bits, vu) << 16) : widen_half(bits);
}

// Round to nearest even, in the low 16 bits; NaN stays NaN.
INLINE vu narrow_bfloat(vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (vu)(x != x);
    return (nan & 0x7fc0u) | (~nan & rounded);
}

// Sums of products of pairs of bfloat16, in the lanes of acc.
INLINE vf dot_pairs(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__) && !defined(EMULATED)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

template <int (*index)(int), size_t... I>
INLINE vf pick(vf a, vf b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, index(I)...);
}

template <int (*index)(int)>
INLINE vf pick(vf a, vf b) {
    return pick<index>(a, b, std::make_index_sequence<LANES>());
}

// Lane i of the halves that are added when 2 vectors become 1: within blocks of four lanes first, then whole blocks.
constexpr int from(int source, int lane) { return (source ? LANES : 0) + lane; }
constexpr int low_1(int i) { return from(i & 1, (i & ~3) + (i & 2) / 2); }
constexpr int high_1(int i) { return low_1(i) + 2; }
constexpr int low_2(int i) { return from((i & 2) / 2, (i & ~3) + (i & 1)); }
constexpr int high_2(int i) { return low_2(i) + 2; }
constexpr int low_3(int i) { return from(i >= LANES / 2, i % (LANES / 2)); }
constexpr int high_3(int i) { return low_3(i) + LANES / 2; }
constexpr int low_4(int i) { return from(i / 4 / 2, i / 4 % 2 * 8 + i % 4); }
constexpr int high_4(int i) { return low_4(i) + 4; }

template <int (*low)(int), int (*high)(int)>
INLINE vf add_halves(vf a, vf b) {
    return pick<low>(a, b) + pick<high>(a, b);
}

// The sums of LANES vectors, one a lane; each by the same tree, whatever stands beside it.
INLINE vf sums(const vf* v) {
    vf once[LANES / 2], twice[LANES / 4];
    for (int i = 0; i < LANES / 2; ++i) once[i] = add_halves<low_1, high_1>(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < LANES / 4; ++i) twice[i] = add_halves<low_2, high_2>(once[2 * i], once[2 * i + 1]);
#if LANES == 4
    return twice[0];
#elif LANES == 8
    return add_halves<low_3, high_3>(twice[0], twice[1]);
#else
    return add_halves<low_4, high_4>(add_halves<low_3, high_3>(twice[0], twice[1]), add_halves<low_3, high_3>(twice[2], twice[3]));
#endif
}

// Limits by select, so that NaN stays NaN.
INLINE vf at_most(vf x, float limit) { return x > limit ? broadcast(limit) : x; }
INLINE vf at_least(vf x, float limit) { return x < limit ? broadcast(limit) : x; }

// e^x to 1e-7, 1e38 and 1e-38 where it would leave float32.
INLINE vf exponential(vf x) {
    x = at_least(at_most(x, 88.0f), -87.0f);
    vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;        // ln 2 in two parts
    vf y = broadcast(1.0f / 5040);
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    vf finite = n == n ? n : broadcast(0.0f);
    return y * (vf)((__builtin_convertvector(finite, vi) + 127) << 23);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE vf hyperbolic_tangent(vf x) {
    vf s = x * x;  // the other form cancels near 0
    vf near = x * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835)))));
    return (s < 0.09f) ? near : 2.0f * sigmoid(2.0f * x) - 1.0f;
}

// erf to 1e-7: 1 - e^(-x^2) p(1 / (1 + x/2)), p fitted by least squares on [0, 5].
INLINE vf error_function(vf x) {
    vf a = (vf)((vu)x & 0x7fffffffu), t = 1.0f / (1.0f + 0.5f * a);
    vf p = broadcast(-0.051092479f);
    p = p * t + 0.34037405f;
    p = p * t - 0.87856162f;
    p = p * t + 0.97612411f;
    p = p * t - 0.34982580f;
    p = p * t + 0.43216479f;
    p = p * t + 0.24562097f;
    p = p * t + 0.28519601f;
    vf y = 1.0f - exponential(-a * a) * p * t;
    return x < 0.0f ? -y : y;
}

}  // namespace
