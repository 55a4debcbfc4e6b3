// Matrix products of a few rows and columns, whose results stay in registers until they are done.

#pragma once

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

namespace {

constexpr int MR = 6;        // rows that `gemm` takes at a time
constexpr Index NR = V * L;  // columns

// Up to four vectors side by side, each in a variable of its own: an array the compiler would put in memory.
template <int K>
struct Row {
  vec a, b, c, d;
  inline void load_from(const float* p) {
    a = load(p), keep_in_register(a);
    if (K > 1) b = load(p + L), keep_in_register(b);
    if (K > 2) c = load(p + 2 * L), keep_in_register(c);
    if (K > 3) d = load(p + 3 * L), keep_in_register(d);
  }
  static inline Row of(const float* p) {
    Row row = {};
    row.load_from(p);
    return row;
  }
  inline void store_to(float* p) const {
    store(p, a);
    if (K > 1) store(p + L, b);
    if (K > 2) store(p + 2 * L, c);
    if (K > 3) store(p + 3 * L, d);
  }
  inline void add(float x, const Row& o) {
    a = multiply_add(x, o.a, a);
    if (K > 1) b = multiply_add(x, o.b, b);
    if (K > 2) c = multiply_add(x, o.c, c);
    if (K > 3) d = multiply_add(x, o.d, d);
  }
};

// c (M, L * K) = a (M, depth) b (depth, L * K), plus `bias` (L * K) unless null, plus c where `accumulate`. These come
// last: what is large next to the products would round every step if it came first. lda, ldb, ldc: floats from row to
// row.
template <int M, int K>
inline void gemm(const float* a, Index lda, const float* b, Index ldb, Index depth, const float* bias, bool accumulate,
                 float* c, Index ldc) {
  Row<K> r[6] = {}, y;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
  for (Index k = 0; k < depth; k++, b += ldb) {
    y.load_from(b);
#define STEP(i) \
  if (i < M) r[i].add(a[i * lda + k], y);
    EACH(STEP)
  }
#define END(i)                                                   \
  if (i < M && bias) r[i].add(1, Row<K>::of(bias));              \
  if (i < M && accumulate) r[i].add(1, Row<K>::of(c + i * ldc)); \
  if (i < M) r[i].store_to(c + i * ldc);
  EACH(END)
#undef EACH
#undef STEP
#undef END
}

template <int K>
inline void gemm(int rows, const float* a, Index lda, const float* b, Index ldb, Index depth, const float* bias,
                 bool accumulate, float* c, Index ldc) {
  switch (rows) {
    case 1: return gemm<1, K>(a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 2: return gemm<2, K>(a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 3: return gemm<3, K>(a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 4: return gemm<4, K>(a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 5: return gemm<5, K>(a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 6: return gemm<6, K>(a, lda, b, ldb, depth, bias, accumulate, c, ldc);
  }
}

// The same for up to MR rows and NR columns, whole vectors.
inline void gemm(int rows, int cols, const float* a, Index lda, const float* b, Index ldb, Index depth,
                 const float* bias, bool accumulate, float* c, Index ldc) {
  switch (cols / L) {
    case 1: return gemm<1>(rows, a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 2: return gemm<2>(rows, a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 3: return gemm<3>(rows, a, lda, b, ldb, depth, bias, accumulate, c, ldc);
    case 4: return gemm<4>(rows, a, lda, b, ldb, depth, bias, accumulate, c, ldc);
  }
}

// c (M, L * K) += a^T b, a (depth, M), b (depth, L * K); where `summed`, sums (M) += the rows of a.
template <int M, int K, bool summed>
inline void gemm_tn(const float* a, Index lda, const float* b, Index ldb, Index depth, float* c, Index ldc,
                    float* sums) {
  constexpr int half = M > 4 ? 4 : 2, rest = M > half ? M - half : 0;  // two vectors that overlap
  typename Floats<half>::type first = {}, last = {}, v = {};
  Row<K> r[6] = {}, y;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
  for (Index k = 0; k < depth; k++, b += ldb, a += lda) {
    for (int i = 0; i < K; i++) __builtin_prefetch(b + 8 * ldb + i * L);  // too far apart for the prefetcher
    __builtin_prefetch(a + 8 * lda);
    y.load_from(b);
#define STEP(i) \
  if (i < M) r[i].add(a[i], y);
    EACH(STEP)
    if (summed) {
      std::memcpy(&v, a, 4 * std::min(M, half)), first += v;
      std::memcpy(&v, a + rest, 4 * std::min(M, half)), last += v;
    }
  }
#define END(i) \
  if (i < M) r[i].add(1, Row<K>::of(c + i * ldc)), r[i].store_to(c + i * ldc);
  EACH(END)
  for (int i = 0; summed && i < M; i++) sums[i] += i < half ? first[i] : last[i - rest];
#undef EACH
#undef STEP
#undef END
}

template <int K, bool summed>
inline void gemm_tn(int rows, const float* a, Index lda, const float* b, Index ldb, Index depth, float* c, Index ldc,
                    float* sums) {
  switch (rows) {
    case 1: return gemm_tn<1, K, summed>(a, lda, b, ldb, depth, c, ldc, sums);
    case 2: return gemm_tn<2, K, summed>(a, lda, b, ldb, depth, c, ldc, sums);
    case 3: return gemm_tn<3, K, summed>(a, lda, b, ldb, depth, c, ldc, sums);
    case 4: return gemm_tn<4, K, summed>(a, lda, b, ldb, depth, c, ldc, sums);
    case 5: return gemm_tn<5, K, summed>(a, lda, b, ldb, depth, c, ldc, sums);
    case 6: return gemm_tn<6, K, summed>(a, lda, b, ldb, depth, c, ldc, sums);
  }
}

template <bool summed = false>
inline void gemm_tn(int rows, int cols, const float* a, Index lda, const float* b, Index ldb, Index depth, float* c,
                    Index ldc, float* sums = nullptr) {
  switch (cols / L) {
    case 1: return gemm_tn<1, summed>(rows, a, lda, b, ldb, depth, c, ldc, sums);
    case 2: return gemm_tn<2, summed>(rows, a, lda, b, ldb, depth, c, ldc, sums);
    case 3: return gemm_tn<3, summed>(rows, a, lda, b, ldb, depth, c, ldc, sums);
    case 4: return gemm_tn<4, summed>(rows, a, lda, b, ldb, depth, c, ldc, sums);
  }
}

// Threads that share the work.
inline int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace
