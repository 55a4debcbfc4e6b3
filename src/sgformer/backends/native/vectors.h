// Vectors as wide as the processor's registers, an extension of GCC and Clang, and functions of them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "interface.h"

namespace {

// L floats fill a register. A matrix product holds 6 rows of V vectors, and V more, in the registers that there are.
#if defined(__AVX512F__)
constexpr int L = 16, V = 4;  // 32 registers
#define IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__AVX__)
constexpr int L = 8, V = 2;  // 16 registers
#define IN_REGISTER(v) asm("" : "+x"(v))
#elif defined(__aarch64__)
constexpr int L = 4, V = 4;  // 32 registers
#define IN_REGISTER(v) asm("" : "+w"(v))
#else
constexpr int L = 4, V = 2;
#define IN_REGISTER(v) (void)v
#endif

#define INLINE inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)
inline vec load(const float* p, int n) {  // the first n, then zeros
  return (vec)_mm512_maskz_loadu_ps((1u << n) - 1, p);
}
inline void store(float* p, vec v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
#else
inline vec load(const float* p, int n) {  // the first n, then zeros
  vec v = {};
  std::memcpy(&v, p, 4 * n);
  return v;
}
inline void store(float* p, vec v, int n) { std::memcpy(p, &v, 4 * n); }
#endif
// n floats: for a few of them, a call of memcpy takes longer than the copy.
inline void copy(float* to, const float* from, Index n) {
  Index i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}
// Otherwise GCC reloads an operand from memory at every use, and loads, not arithmetic, become the bottleneck.
inline void keep_in_register(vec& v) { IN_REGISTER(v); }
inline vec broadcast(float x) { return vec{} + x; }
// x y + z, rounded once where the processor can. Said, not left to the compiler: GCC contracts the expression in some
// loops and not in others, and then a row's result would depend on how many rows are computed beside it.
inline vec multiply_add(float x, vec y, vec z) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)y, (__m512)z);
#elif defined(__FMA__)
  return (vec)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)y, (__m256)z);
#elif defined(__aarch64__)
  return (vec)vfmaq_n_f32((float32x4_t)z, (float32x4_t)y, x);
#else
  return x * y + z;
#endif
}
inline vec max(vec a, vec b) { return a > b ? a : b; }
inline vec min(vec a, vec b) { return a < b ? a : b; }
inline ivec lane_mask(Index n) {  // all bits set in the first n lanes
  ivec mask;
  for (int i = 0; i < L; i++) mask[i] = i < n ? -1 : 0;
  return mask;
}
inline Index round_up(Index n) { return (n + L - 1) / L * L; }  // to whole vectors

// Reductions halve the vector repeatedly: L steps in a row would take as long as the rest of a short softmax.
template <int N>
struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <int N, class Combine>
inline float reduce(typename Floats<N>::type v, Combine combine) {
  if constexpr (N == 2) {
    return combine(v[0], v[1]);
  } else {
    typename Floats<N / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return reduce<N / 2>(combine(half[0], half[1]), combine);
  }
}
inline float reduce_sum(vec v) {
  return reduce<L>(v, [](auto a, auto b) { return a + b; });
}
inline float reduce_max(vec v) {
  return reduce<L>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// The polynomial in x with these coefficients, highest degree first.
template <class... Coefficients>
inline vec polynomial(vec x, float first, Coefficients... rest) {
  vec y = broadcast(first);
  ((y = y * x + rest), ...);
  return y;
}

// exp(x) for x <= 0, NaN for NaN: 2^n times a polynomial (Taylor, degree 6, |r| <= ln 2 / 2, relative error 2e-7).
inline vec exp_nonpositive(vec x) {
  x = max(broadcast(-87.f), x);             // in this order: a comparison with NaN is false, and takes the second
  const vec magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  vec shifted = x * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  const vec y = polynomial(r, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f);
  return (vec)((ivec)y + (((ivec)shifted - (ivec)magic) << 23));
}

// erf(x / sqrt 2). erf(y) / y on |y| <= 4 is a polynomial in t = y^2 / 8 - 1, fitted by least squares at Chebyshev
// points; beyond, erf is 1. Absolute error below 4e-7.
INLINE vec erf_over_sqrt2(vec x) {
  vec y = x * 0.70710678f;
  y = min(max(y, broadcast(-4.f)), broadcast(4.f));
  vec t = y * y * 0.125f - 1.f;
  const vec p = polynomial(t, 0.0023489738814532757f, -0.005911088082939386f, 0.0038355356082320213f,
                           -0.0033103416208177805f, 0.01446361280977726f, -0.02647116780281067f, 0.033392153680324554f,
                           -0.04419896751642227f, 0.059699200093746185f, -0.07503651827573776f, 0.09024584293365479f,
                           -0.10768406838178635f, 0.1316727101802826f, -0.1765768676996231f, 0.35353103280067444f);
  return t < 1.f ? p * y : y * 0.25f;  // beyond, exactly 1: then GELU is x, or 0
}

// x (1 + erf(x / sqrt 2)) / 2.
INLINE vec gelu(vec x) {
  const vec half = x * 0.5f;
  return half + half * erf_over_sqrt2(x);
}

// The same with an error of up to 1e-4: on |y| <= 3, a shorter polynomial in t = y^2 / 4.5 - 1.
INLINE vec gelu_short(vec x) {
  vec y = min(max(x * 0.70710678f, broadcast(-3.f)), broadcast(3.f));
  const vec t = y * y * 0.22222222f - 1.f, half = x * 0.5f;
  const vec p = polynomial(t, -0.011683274991810322f, 0.03354454040527344f, -0.047970000654459f, 0.06845840811729431f,
                           -0.10815271735191345f, 0.15797634422779083f, -0.2289821207523346f, 0.47012534737586975f);
  return half + half * (t < 1.f ? p * y : y * 0.33333334f);
}

// GELU, and its derivative: (1 + erf(x / sqrt 2)) / 2 + x exp(-x^2 / 2) / sqrt(2 pi).
inline vec gelu(vec x, vec& derivative) {
  const vec cdf = erf_over_sqrt2(x) * 0.5f + 0.5f;
  derivative = cdf + x * 0.39894228f * exp_nonpositive(x * x * -0.5f);
  return x * cdf;
}

}  // namespace
