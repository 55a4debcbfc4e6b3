// The network's operations in float32 on the CPU, fused, and whole blocks made of them for inference; gradients of the
// costly ones for training.
//
// Plain C interface, so that no header of Python or torch is needed: sgformer/ops/native/__init__.py compiles this file in
// seconds and calls it. Vectors are GCC's and Clang's own extension, as wide as the processor's registers. Parallel with
// OpenMP, whose runtime torch has loaded already.
//
// Legend: B batch, H x W token grid, N tokens, C channels, h heads, d channels of a head. Tokens are (B, H, W, C); a "row
// stride" is the distance, in floats, from one token to the next, so that slices of a wider tensor need no copy.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// L floats fill a register. The matrix product holds 6 rows of V vectors, and V more, in the registers that there are.
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

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef int64_t Index;

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec load(const float* p, int n) {  // the first n, then zeros
  vec v = {};
  std::memcpy(&v, p, 4 * n);
  return v;
}
inline void store(float* p, vec v, int n) { std::memcpy(p, &v, 4 * n); }
// GCC would rather read an operand from memory again for every use; loads, not arithmetic, would then be the limit.
inline void in_register(vec& v) { IN_REGISTER(v); }
inline vec fill(float x) { return vec{} + x; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline vec smaller(vec a, vec b) { return a < b ? a : b; }
inline ivec first_lanes(Index n) {  // all bits set in the first n
  ivec lane;
  for (int i = 0; i < L; i++) lane[i] = i < n ? -1 : 0;
  return lane;
}
// Halves upon halves: L steps one after the other would take as long as the rest of a short softmax.
template <int N>
struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <int N, class Combine>
inline float fold(typename Floats<N>::type v, Combine combine) {
  if constexpr (N == 2) {
    return combine(v[0], v[1]);
  } else {
    typename Floats<N / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return fold<N / 2>(combine(half[0], half[1]), combine);
  }
}
inline float sum(vec v) {
  return fold<L>(v, [](auto a, auto b) { return a + b; });
}
inline float greatest(vec v) {
  return fold<L>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// The polynomial in x with these coefficients, highest degree first.
template <class... Floats>
inline vec polynomial(vec x, float first, Floats... rest) {
  vec y = fill(first);
  ((y = y * x + rest), ...);
  return y;
}

// exp(x) for x <= 0, and nan for nan: 2^n times a polynomial (Taylor, degree 6, |r| <= ln 2 / 2, relative error 2e-7).
inline vec exp_negative(vec x) {
  x = larger(fill(-87.f), x);  // in this order: a comparison with nan is false, and takes the second
  const vec magic = fill(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  vec shifted = x * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  const vec y = polynomial(r, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f);
  return (vec)((ivec)y + (((ivec)shifted - (ivec)magic) << 23));
}

// erf(x / sqrt 2). erf(y) / y on |y| <= 4 as a polynomial in t = y^2 / 8 - 1, fitted by least squares at Chebyshev points;
// beyond, erf is 1. Absolute error below 4e-7.
inline vec erf_half(vec x) {
  vec y = x * 0.70710678f;
  y = smaller(larger(y, fill(-4.f)), fill(4.f));
  vec t = y * y * 0.125f - 1.f;
  const vec p = polynomial(t, 0.0023489738814532757f, -0.005911088082939386f, 0.0038355356082320213f, -0.0033103416208177805f,
                           0.01446361280977726f, -0.02647116780281067f, 0.033392153680324554f, -0.04419896751642227f,
                           0.059699200093746185f, -0.07503651827573776f, 0.09024584293365479f, -0.10768406838178635f,
                           0.1316727101802826f, -0.1765768676996231f, 0.35353103280067444f);
  return t < 1.f ? p * y : y * 0.25f;  // beyond, exactly 1: then GELU is x, or 0
}

// x (1 + erf(x / sqrt 2)) / 2.
inline vec gelu(vec x) {
  const vec half = x * 0.5f;
  return half + half * erf_half(x);
}

// GELU of x, and its derivative there: (1 + erf(x / sqrt 2)) / 2 + x exp(-x^2 / 2) / sqrt(2 pi).
inline vec gelu(vec x, vec& derivative) {
  const vec normal = erf_half(x) * 0.5f + 0.5f;
  derivative = normal + x * 0.39894228f * exp_negative(x * x * -0.5f);
  return x * normal;
}

// Mean and inverse standard deviation of C floats that are about to be normalised.
inline void moments(const float* x, Index C, float eps, float& mean, float& scale) {
  vec s = {};
  Index c = 0;
  for (; c + L <= C; c += L) s += load(x + c);
  float total = sum(s);
  for (Index i = c; i < C; i++) total += x[i];
  mean = total / C;
  vec m = fill(mean), q = {};
  for (c = 0; c + L <= C; c += L) {
    vec d = load(x + c) - m;
    q += d * d;
  }
  float squares = sum(q);
  for (; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
  scale = 1 / std::sqrt(squares / C + eps);
}

// to = (x - mean) * scale * weight + bias, then GELU if `act`, of C floats; to may be x.
inline void normalise(const float* x, float* to, Index C, float mean, float scale, const float* weight, const float* bias,
                      int act) {
  auto made = [=](vec v, vec w, vec b) {
    v = (v - mean) * scale * w + b;
    return act ? gelu(v) : v;
  };
  Index c = 0;
  for (; c + L <= C; c += L) store(to + c, made(load(x + c), load(weight + c), load(bias + c)));
  const int n = C - c;
  if (n) store(to + c, made(load(x + c, n), load(weight + c, n), load(bias + c, n)), n);
}

constexpr int CHUNK = 32;  // channels that a depthwise convolution takes at a time: three rows of them fit in L1

// What will soon be wanted of CHUNK channels, a row ahead: strides are too long for the processor to guess.
inline void fetch(const float* p) {
  __builtin_prefetch(p);
  __builtin_prefetch(p + 16);
}

// Row y of a 3 x 3 depthwise convolution of n <= CHUNK channels. `rows`: a ring of three, y and its neighbours, each W + 2
// times CHUNK floats; taps are `step` apart from w on; `start`, unless null, is what sums begin with.
inline void convolve_row(const float* rows, Index y, Index W, int n, const float* w, Index step, const float* start,
                         float* made) {
  const Index row = (W + 2) * CHUNK;
  for (int c = 0; c < n; c += L, w += L) {
    const float *above = rows + (y + 2) % 3 * row + c, *here = rows + y % 3 * row + c, *below = rows + (y + 1) % 3 * row + c;
    const vec w0 = load(w), w1 = load(w + step), w2 = load(w + 2 * step), w3 = load(w + 3 * step), w4 = load(w + 4 * step),
              w5 = load(w + 5 * step), w6 = load(w + 6 * step), w7 = load(w + 7 * step), w8 = load(w + 8 * step),
              first = start ? load(start + c) : vec{};
    for (Index x = 0; x < W * CHUNK; x += CHUNK) {
      vec v = first + load(above + x) * w0 + load(above + x + CHUNK) * w1 + load(above + x + 2 * CHUNK) * w2;
      vec u = load(here + x) * w3 + load(here + x + CHUNK) * w4 + load(here + x + 2 * CHUNK) * w5;
      v += load(below + x) * w6 + load(below + x + CHUNK) * w7 + load(below + x + 2 * CHUNK) * w8;
      store(made + x + c, v + u);
    }
  }
}

// 3 x 3 depthwise convolution of one image and n <= CHUNK channels, zero padding. Three rows of the source are kept, so
// the destination may be the source. finish(row of W x CHUNK results, where they go) stores them.
template <class Finish>
void depthwise(const float* source, Index stride, float* out, Index out_stride, Index H, Index W, int n, const float* weight,
               Index C, const float* bias, float* rows, Finish finish) {
  const Index row = (W + 2) * CHUNK;
  float w[9 * CHUNK] = {}, start[CHUNK] = {}, *made = rows + 3 * row;
  for (int k = 0; k < 9; k++) std::memcpy(w + k * CHUNK, weight + k * C, 4 * n);
  std::memcpy(start, bias, 4 * n);
  std::memset(rows, 0, 4 * row * 4);  // the columns left and right stay zero, and so does what lies beyond n
  auto keep = [&](Index y) {
    float* to = rows + (y % 3) * row + CHUNK;
    const float* from = source + y * W * stride;
    if (n == CHUNK)
      for (Index x = 0; x < W; x++) {
        fetch(from + (x + W) * stride);
        std::memcpy(to + x * CHUNK, from + x * stride, 4 * CHUNK);
      }
    else
      for (Index x = 0; x < W; x++) std::memcpy(to + x * CHUNK, from + x * stride, 4 * n);
  };
  keep(0);
  for (Index y = 0; y < H; y++) {
    if (y + 1 < H)
      keep(y + 1);
    else
      std::memset(rows + ((y + 1) % 3) * row, 0, row * 4);
    convolve_row(rows, y, W, n, w, CHUNK, start, made);
    finish(made, out + y * W * out_stride);
  }
}

// Up to four vectors side by side, each in a variable of its own: of an array the compiler would make memory.
template <int K>
struct Row {
  vec a, b, c, d;
  inline void load_from(const float* p) {
    a = load(p), in_register(a);
    if (K > 1) b = load(p + L), in_register(b);
    if (K > 2) c = load(p + 2 * L), in_register(c);
    if (K > 3) d = load(p + 3 * L), in_register(d);
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
    a += x * o.a;
    if (K > 1) b += x * o.b;
    if (K > 2) c += x * o.c;
    if (K > 3) d += x * o.d;
  }
};

constexpr int R = 6;  // rows that `multiply` takes at a time

// out (M, L * K) = left (M, n) times right (n, L * K), plus `start` (L * K) unless null, plus out where `add`. These come
// last: what is large next to the products would round every step if it came first.
template <int M, int K>
inline void multiply(const float* left, Index left_pitch, const float* right, Index pitch, Index n, const float* start,
                     bool add, float* out, Index out_pitch) {
  Row<K> r[6] = {}, y;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
  for (Index k = 0; k < n; k++, right += pitch) {
    y.load_from(right);
#define STEP(i) \
  if (i < M) r[i].add(left[i * left_pitch + k], y);
    EACH(STEP)
  }
#define END(i)                                                    \
  if (i < M && start) r[i].add(1, Row<K>::of(start));             \
  if (i < M && add) r[i].add(1, Row<K>::of(out + i * out_pitch)); \
  if (i < M) r[i].store_to(out + i * out_pitch);
  EACH(END)
#undef EACH
#undef STEP
#undef END
}

template <int K>
inline void multiply(int rows, const float* left, Index left_pitch, const float* right, Index pitch, Index n,
                     const float* start, bool add, float* out, Index out_pitch) {
  switch (rows) {
    case 1: return multiply<1, K>(left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 2: return multiply<2, K>(left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 3: return multiply<3, K>(left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 4: return multiply<4, K>(left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 5: return multiply<5, K>(left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 6: return multiply<6, K>(left, left_pitch, right, pitch, n, start, add, out, out_pitch);
  }
}

// The same for up to R rows and a width of up to V vectors.
inline void multiply(int rows, int width, const float* left, Index left_pitch, const float* right, Index pitch, Index n,
                     const float* start, bool add, float* out, Index out_pitch) {
  switch (width / L) {
    case 1: return multiply<1>(rows, left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 2: return multiply<2>(rows, left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 3: return multiply<3>(rows, left, left_pitch, right, pitch, n, start, add, out, out_pitch);
    case 4: return multiply<4>(rows, left, left_pitch, right, pitch, n, start, add, out, out_pitch);
  }
}

constexpr Index PANEL = V * L;  // columns that `multiply` takes at a time

// out (M, L * K) += the transpose of left (n, M) times right (n, L * K); where `summed`, sums (M) += the rows of left.
template <int M, int K, bool summed>
inline void multiply_across(const float* left, Index left_pitch, const float* right, Index pitch, Index n, float* out,
                            Index out_pitch, float* sums) {
  constexpr int half = M > 4 ? 4 : 2, rest = M > half ? M - half : 0;  // two vectors that overlap
  typename Floats<half>::type first = {}, last = {}, v = {};
  Row<K> r[6] = {}, y;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
  for (Index k = 0; k < n; k++, right += pitch, left += left_pitch) {
    for (int i = 0; i < K; i++) __builtin_prefetch(right + 8 * pitch + i * L);  // rows too far apart for the processor to guess
    __builtin_prefetch(left + 8 * left_pitch);
    y.load_from(right);
#define STEP(i) \
  if (i < M) r[i].add(left[i], y);
    EACH(STEP)
    if (summed) {
      std::memcpy(&v, left, 4 * std::min(M, half)), first += v;
      std::memcpy(&v, left + rest, 4 * std::min(M, half)), last += v;
    }
  }
#define END(i) \
  if (i < M) r[i].add(1, Row<K>::of(out + i * out_pitch)), r[i].store_to(out + i * out_pitch);
  EACH(END)
  for (int i = 0; summed && i < M; i++) sums[i] += i < half ? first[i] : last[i - rest];
#undef EACH
#undef STEP
#undef END
}

template <int K, bool summed>
inline void multiply_across(int rows, const float* left, Index left_pitch, const float* right, Index pitch, Index n,
                            float* out, Index out_pitch, float* sums) {
  switch (rows) {
    case 1: return multiply_across<1, K, summed>(left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 2: return multiply_across<2, K, summed>(left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 3: return multiply_across<3, K, summed>(left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 4: return multiply_across<4, K, summed>(left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 5: return multiply_across<5, K, summed>(left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 6: return multiply_across<6, K, summed>(left, left_pitch, right, pitch, n, out, out_pitch, sums);
  }
}

template <bool summed = false>
inline void multiply_across(int rows, int width, const float* left, Index left_pitch, const float* right, Index pitch,
                            Index n, float* out, Index out_pitch, float* sums = nullptr) {
  switch (width / L) {
    case 1: return multiply_across<1, summed>(rows, left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 2: return multiply_across<2, summed>(rows, left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 3: return multiply_across<3, summed>(rows, left, left_pitch, right, pitch, n, out, out_pitch, sums);
    case 4: return multiply_across<4, summed>(rows, left, left_pitch, right, pitch, n, out, out_pitch, sums);
  }
}

// exp of the first n less their greatest, zeros up to a whole number of vectors. Returns what makes a softmax of them; with
// it they are added to `sums` unless null.
inline float exponentials(float* row, Index n, float* sums) {
  const Index whole = n / L * L;
  const ivec tail = first_lanes(n - whole);
  vec last = fill(-INFINITY), top = last, total = {};
  if (whole < n) last = top = tail ? load(row + whole) : last;
  for (Index m = 0; m < whole; m += L) top = larger(top, load(row + m));
  const float highest = greatest(top);
  if (whole < n) store(row + whole, total = tail ? exp_negative(last - highest) : vec{});
  for (Index m = 0; m < whole; m += L) {
    const vec e = exp_negative(load(row + m) - highest);
    store(row + m, e);
    total += e;
  }
  const float norm = 1 / sum(total);
  if (sums)
    for (Index m = 0; m < n; m += L) store(sums + m, load(sums + m) + load(row + m) * norm);
  return norm;
}

int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

extern "C" {

Index sgformer_lanes() { return L; }
Index sgformer_panel() { return PANEL; }

// A weight (width, n) as sgformer_linear wants it, where it maps n to width; or, `transposed`, as it maps width to n.
void sgformer_pack(const float* weight, Index width, Index n, Index transposed, float* packed) {
  const Index across = transposed ? n : width, down = transposed ? width : n, panels = (across + PANEL - 1) / PANEL;
  const Index padded = (across + L - 1) / L * L, part = 64, parts = (down + part - 1) / part;
#pragma omp parallel for schedule(static)
  for (Index task = 0; task < panels * parts; task++) {
    const Index c = task / parts * PANEL, wide = std::min(PANEL, padded - c), real = std::min(PANEL, across - c);
    const Index first = task % parts * part, last = std::min(first + part, down);
    float* to = packed + c * down;
    if (transposed) {
      for (Index k = first; k < last; k++) {
        std::memcpy(to + k * wide, weight + k * n + c, 4 * real);
        std::memset(to + k * wide + real, 0, 4 * (wide - real));
      }
    } else {
      for (Index j = 0; j < wide; j++) {
        if (j + 4 < real)  // the rows are too far apart for the processor to guess
          for (Index i = first; i < last; i += 16) __builtin_prefetch(weight + (c + j + 4) * n + i);
        for (Index i = first; i < last; i++) to[i * wide + j] = j < real ? weight[(c + j) * n + i] : 0;
      }
    }
  }
}

// out = x weight + bias, plus what `add` points to unless null; x (rows, n), add and out (rows, width), each with a row
// stride. weight: panels of PANEL columns, (n, PANEL) each, the last one as wide as a multiple of L must be; bias padded
// likewise.
void sgformer_linear(const float* x, Index x_stride, const float* weight, const float* bias, const float* add,
                     Index add_stride, float* out, Index out_stride, Index rows, Index n, Index width) {
  // A task is so many rows that they stay in the cache while all panels pass; or one panel, if tasks would be too few.
  const Index panels = (width + PANEL - 1) / PANEL, padded = (width + L - 1) / L * L, groups = (rows + R - 1) / R;
  const Index most = std::max<Index>(1, 32768 / n / R), blocks = (groups + most - 1) / most;
  const Index cuts = blocks < 4 * threads() ? panels : 1;
#pragma omp parallel for schedule(dynamic)
  for (Index task = 0; task < blocks * cuts; task++) {
    const Index block = task / cuts, cut = task % cuts;
    const Index first = groups * block / blocks * R, last = std::min(groups * (block + 1) / blocks * R, rows);
    for (Index p = cut * panels / cuts; p < (cut + 1) * panels / cuts; p++) {
      const Index c = p * PANEL, wide = std::min(PANEL, padded - c), real = std::min(PANEL, width - c);
      for (Index r = first; r < last; r += R) {
        const int count = std::min<Index>(R, last - r);
        float spare[R * PANEL], *to = out + r * out_stride + c;
        const bool direct = wide == real && (!add || add == out);
        if (!direct && add)
          for (int i = 0; i < count; i++) std::memcpy(spare + i * PANEL, add + (r + i) * add_stride + c, 4 * real);
        multiply(count, wide, x + r * x_stride, x_stride, weight + c * n, wide, n, bias + c, add, direct ? to : spare,
                 direct ? out_stride : PANEL);
        if (!direct)
          for (int i = 0; i < count; i++) std::memcpy(to + i * out_stride, spare + i * PANEL, 4 * real);
      }
    }
  }
}

// k x k convolution of x (B, H, W, C), contiguous, to out (B, Ho, Wo, width), zero padding; weight and bias as of
// sgformer_linear, with the rows of the weight in the order (row, column, channel) of the kernel.
void sgformer_conv(const float* x, Index B, Index H, Index W, Index C, Index k, Index step, Index pad, const float* weight,
                   const float* bias, float* out, Index Ho, Index Wo, Index width) {
  const Index n = k * k * C, pixels = B * Ho * Wo, groups = (pixels + R - 1) / R;
  if (!pixels) return;
  const Index high = std::max<Index>(1, std::min<Index>({32768 / n, groups / (4 * threads()), 16}));
  const Index depth = 512, wide = (width + L - 1) / L * L, blocks = (groups + high - 1) / high;
  const Index cuts = std::min((width + PANEL - 1) / PANEL, std::max<Index>(1, 4 * threads() / blocks));
  const Index panels = (width + PANEL - 1) / PANEL;
#pragma omp parallel
  {
    std::vector<float> patches(high * R * n), made(high * R * wide);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < blocks * cuts; task++) {
      const Index first = task / cuts * high * R, last = std::min(first + high * R, pixels), cut = task % cuts;
      for (Index p = first; p < last; p++) {
        const Index b = p / Wo / Ho, y0 = p / Wo % Ho * step - pad, x0 = p % Wo * step - pad;
        const Index left = std::max<Index>(0, -x0), right = std::min(k, W - x0);
        for (Index i = 0; i < k; i++) {
          float* to = &patches[(p - first) * n + i * k * C];
          if (y0 + i < 0 || y0 + i >= H) {
            std::memset(to, 0, 4 * k * C);
            continue;
          }
          std::memset(to, 0, 4 * left * C);
          std::memcpy(to + left * C, x + ((b * H + y0 + i) * W + x0 + left) * C, 4 * (right - left) * C);
          std::memset(to + right * C, 0, 4 * (k - right) * C);
        }
      }
      for (Index from = 0; from < n; from += depth)
        for (Index panel = cut * panels / cuts; panel < (cut + 1) * panels / cuts; panel++) {
          const Index c = panel * PANEL, across = std::min(PANEL, wide - c);
          for (Index r = first; r < last; r += R)
            multiply(std::min<Index>(R, last - r), across, &patches[(r - first) * n + from], n,
                     weight + c * n + from * across, across, std::min(depth, n - from), from ? nullptr : bias + c, from > 0,
                     &made[(r - first) * wide + c], wide);
        }
      const Index begin = cut * panels / cuts * PANEL, end = std::min((cut + 1) * panels / cuts * PANEL, width);
      for (Index r = first; r < last; r++) std::memcpy(out + r * width + begin, &made[(r - first) * wide + begin], 4 * (end - begin));
    }
  }
}

// Winograd's B^T d B of the 4 x 4 pixels from `top` and `left` on of an image (H, W, C), `nothing` where there are none: 16
// vectors of C, `pitch` apart.
static void patch(const float* x, Index H, Index W, Index C, Index top, Index left, const float* nothing, float* out,
                  Index pitch) {
  const float* at[16];
  for (int i = 0; i < 16; i++) {
    const Index y = top + i / 4, z = left + i % 4;
    at[i] = y < 0 || y >= H || z < 0 || z >= W ? nothing : x + (y * W + z) * C;
  }
  for (Index c = 0; c < C; c += L) {
    vec d[4][4];
    for (int j = 0; j < 4; j++) {  // B^T d
      const vec p = load(at[j] + c), q = load(at[4 + j] + c), r = load(at[8 + j] + c), s = load(at[12 + j] + c);
      d[0][j] = p - r, d[1][j] = q + r, d[2][j] = r - q, d[3][j] = q - s;
    }
    for (int i = 0; i < 4; i++) {  // times B
      store(out + (4 * i) * pitch + c, d[i][0] - d[i][2]);
      store(out + (4 * i + 1) * pitch + c, d[i][1] + d[i][2]);
      store(out + (4 * i + 2) * pitch + c, d[i][2] - d[i][1]);
      store(out + (4 * i + 3) * pitch + c, d[i][1] - d[i][3]);
    }
  }
}

// 3 x 3 convolution, zero padding, step 1, with 16 products where there would be 36 (Winograd's F(2 x 2, 3 x 3); Lavin and
// Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016). x (B, H, W, C), out (B, H, W, width), contiguous, C
// and width multiples of L; weight: 16 matrices G g G^T as of sgformer_linear, no bias.
void sgformer_winograd(const float* x, Index B, Index H, Index W, Index C, const float* weight, float* out, Index width) {
  const Index across = (W + 1) / 2, tiles = (H + 1) / 2 * across, T = 4 * R, blocks = (tiles + T - 1) / T;
  const std::vector<float> nothing(C);
#pragma omp parallel
  {
    std::vector<float> seen(16 * T * C), made(16 * T * width);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * blocks; task++) {
      const Index b = task / blocks, first = task % blocks * T, count = std::min(T, tiles - first);
      for (Index t = 0; t < count; t++) {
        patch(x + b * H * W * C, H, W, C, (first + t) / across * 2 - 1, (first + t) % across * 2 - 1, nothing.data(),
              &seen[t * C], T * C);
      }
      for (Index i = 0; i < 16; i++)
        for (Index c = 0; c < width; c += PANEL) {
          const Index wide = std::min(PANEL, width - c);
          for (Index r = 0; r < count; r += R)
            multiply(std::min<Index>(R, count - r), wide, &seen[(i * T + r) * C], C, weight + i * C * width + c * C, wide, C,
                     nullptr, false, &made[(i * T + r) * width + c], width);
        }
      for (Index t = 0; t < count; t++) {
        const Index y = (first + t) / across * 2, z = (first + t) % across * 2;
        float* to = out + ((b * H + y) * W + z) * width;
        for (Index c = 0; c < width; c += L) {
          const float* from = &made[t * width + c];
          vec low[4], high[4];
          for (int j = 0; j < 4; j++) {  // A^T m
            const vec p = load(from + j * T * width), q = load(from + (4 + j) * T * width);
            const vec r = load(from + (8 + j) * T * width), s = load(from + (12 + j) * T * width);
            low[j] = p + q + r, high[j] = q - r - s;
          }
          store(to + c, low[0] + low[1] + low[2]);  // times A
          if (z + 1 < W) store(to + width + c, low[1] - low[2] - low[3]);
          if (y + 1 < H) store(to + W * width + c, high[0] + high[1] + high[2]);
          if (y + 1 < H && z + 1 < W) store(to + (W + 1) * width + c, high[1] - high[2] - high[3]);
        }
      }
    }
  }
}

// 3 x 3 depthwise convolution with a step of two, zero padding: x (B, H, W, C) to out (B, Ho, Wo, C); weight (9, C).
void sgformer_depthwise_halve(const float* x, Index B, Index H, Index W, Index C, const float* weight, float* out) {
  const Index Ho = (H + 1) / 2, Wo = (W + 1) / 2;
#pragma omp parallel for schedule(static)
  for (Index row = 0; row < B * Ho; row++) {
    const Index b = row / Ho, y = row % Ho * 2;
    for (Index z = 0; z < Wo; z++) {
      float* to = out + (row * Wo + z) * C;
      for (Index c = 0; c < C; c += L) {
        const int n = std::min<Index>(L, C - c);
        vec total = {};
        for (Index i = -1; i < 2; i++)
          for (Index j = -1; j < 2; j++) {
            if (y + i < 0 || y + i >= H || 2 * z + j < 0 || 2 * z + j >= W) continue;
            const float *from = x + ((b * H + y + i) * W + 2 * z + j) * C + c, *w = weight + (3 * i + j + 4) * C + c;
            total += n == L ? load(from) * load(w) : load(from, n) * load(w, n);
          }
        n == L ? store(to + c, total) : store(to + c, total, n);
      }
    }
  }
}

// out = GELU(depthwise convolution of h). h, out (B, H, W, C) contiguous, which may be the same; weight (9, C).
void sgformer_depthwise_gelu(const float* h, float* out, Index B, Index H, Index W, Index C, const float* weight, const float* bias) {
  const Index chunks = (C + CHUNK - 1) / CHUNK;
#pragma omp parallel
  {
    std::vector<float> rows(4 * (W + 2) * CHUNK);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * chunks; task++) {
      const Index c = task % chunks * CHUNK;
      const Index image = task / chunks * H * W * C + c;
      const int n = std::min<Index>(CHUNK, C - c);
      auto finish = [=](const float* row, float* to) {
        for (Index x = 0; x < W; x++, row += CHUNK, to += C) {
          if (n == CHUNK)
            for (int i = 0; i < CHUNK; i += L) store(to + i, gelu(load(row + i)));
          else
            for (int i = 0; i < n; i += L) store(to + i, gelu(load(row + i)), std::min(L, n - i));
        }
      };
      depthwise(h + image, C, out + image, C, H, W, n, weight + c, C, bias + c, rows.data(), finish);
    }
  }
}

// out += depthwise convolution of x. x (B, H, W, C) with a row stride, out contiguous, weight (9, C).
void sgformer_depthwise_add(const float* x, Index stride, float* out, Index B, Index H, Index W, Index C, const float* weight,
                            const float* bias) {
  const Index chunks = (C + CHUNK - 1) / CHUNK;
#pragma omp parallel
  {
    std::vector<float> rows(4 * (W + 2) * CHUNK);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * chunks; task++) {
      const Index c = task % chunks * CHUNK, image = task / chunks * H * W;
      const int n = std::min<Index>(CHUNK, C - c);
      auto finish = [=](const float* row, float* to) {
        for (Index x = 0; x < W; x++, row += CHUNK, to += C)
          for (int i = 0; i < n; i++) to[i] += row[i];
      };
      depthwise(x + image * stride + c, stride, out + image * C + c, C, H, W, n, weight + c, C,
                bias + c, rows.data(), finish);
    }
  }
}

// out = LayerNorm(x), then GELU if `act`, row by row of (rows, C), both contiguous.
void sgformer_layer_norm(const float* x, float* out, Index rows, Index C, const float* weight, const float* bias, float eps,
                         int act) {
#pragma omp parallel for schedule(static)
  for (Index r = 0; r < rows; r++) {
    float mean, scale;
    moments(x + r * C, C, eps, mean, scale);
    normalise(x + r * C, out + r * C, C, mean, scale, weight, bias, act);
  }
}

// Mean and inverse standard deviation of every image of x (B, N, C), contiguous.
static void group_moments(const float* x, Index B, Index N, Index C, float eps, float* mean, float* scale) {
  const Index step = std::max<Index>(1, 4096 / C), parts = (N + step - 1) / step;
  std::vector<double> means(B * parts), squares(B * parts);
#pragma omp parallel for schedule(static)
  for (Index task = 0; task < B * parts; task++) {
    const Index first = task % parts * step, count = std::min(step, N - first) * C;
    const float* from = x + (task / parts * N + first) * C;
    float mean, scale;
    moments(from, count, 0, mean, scale);
    means[task] = mean;
    squares[task] = std::isfinite(scale) ? count / ((double)scale * scale) : 0;  // sum of squares about the mean
  }
  for (Index b = 0; b < B; b++) {  // Chan, Golub, LeVeque: moments of parts to moments of the whole
    double m = 0, s = 0, seen = 0;
    for (Index p = 0; p < parts; p++) {
      const double n = (double)std::min(step, N - p * step) * C, delta = means[b * parts + p] - m;
      s += squares[b * parts + p] + delta * delta * seen * n / (seen + n);
      m += delta * n / (seen + n);
      seen += n;
    }
    mean[b] = m;
    scale[b] = 1 / std::sqrt(s / seen + eps);
  }
}

// out = GroupNorm with one group of x, then GELU if `act`; x, out (B, N, C) contiguous, which may be the same.
void sgformer_group_norm(const float* x, float* out, Index B, Index N, Index C, const float* weight, const float* bias,
                         float eps, int act) {
  std::vector<float> mean(B), scale(B);
  group_moments(x, B, N, C, eps, mean.data(), scale.data());
#pragma omp parallel for schedule(static)
  for (Index r = 0; r < B * N; r++) {
    normalise(x + r * C, out + r * C, C, mean[r / N], scale[r / N], weight, bias, act);
  }
}

// Softmax attention window by window, and the attention that every key received.
//
// q (B, H, W, h * d) with a row stride; kv (B, Hk, Wk, 2 * h * d), keys first, with a row stride; out as q. A window has
// wh x ww queries and kh x kw keys; where it sticks out of the grid, what lies outside does not exist. Grids hold equally
// many windows. received (B, H, W), averaged over heads and the wh x ww queries of a whole window, of the key that stands
// for the token: the grid of keys is that of queries, `spread` times as coarse in both directions. Null: not wanted.
void sgformer_attend(const float* q, Index q_stride, const float* kv, Index kv_stride, float* out, Index out_stride, Index B,
                     Index H, Index W, Index Hk, Index Wk, Index wh, Index ww, Index kh, Index kw, Index heads, Index d,
                     float* received, Index spread) {
  const Index rows = (H + wh - 1) / wh, cols = (W + ww - 1) / ww, windows = rows * cols;
  const Index keys = std::min(kh, Hk) * std::min(kw, Wk), queries = std::min(wh, H) * std::min(ww, W);
  const Index part = 512, parts = (queries + part - 1) / part;
  const Index pitch = (keys + L - 1) / L * L, wide = (d + L - 1) / L * L;
  const float scale = 1 / std::sqrt((float)d);
  std::vector<float> seen(received ? B * windows * heads * parts * pitch : 0);
#pragma omp parallel
  {
    std::vector<float> rows(keys * d), k(d * pitch), v(pitch * wide), x(R * d), s(R * pitch), o(R * wide);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * windows * heads * parts; task++) {
      const Index p = task % parts, head = task / parts % heads, win = task / parts / heads % windows;
      const Index b = task / parts / heads / windows, wy = win / cols, wx = win % cols;
      const Index y0 = wy * kh, x0 = wx * kw, nky = std::min(kh, Hk - y0), nkx = std::min(kw, Wk - x0), M = nky * nkx;
      const Index qy0 = wy * wh, qx0 = wx * ww, nqx = std::min(ww, W - qx0), nq = std::min(wh, H - qy0) * nqx;
      const Index first = p * part, last = std::min(first + part, nq), padded = (M + L - 1) / L * L;
      if (first >= last) continue;
      for (Index m = 0; m < M; m++) {
        const float* from = kv + ((b * Hk + y0 + m / nkx) * Wk + x0 + m % nkx) * kv_stride + head * d;
        std::memcpy(&rows[m * d], from, 4 * d);
        std::memcpy(&v[m * wide], from + heads * d, 4 * d);
      }
      for (Index c = 0; c < d; c++) {
        for (Index m = 0; m < M; m++) k[c * pitch + m] = rows[m * d + c] * scale;
        for (Index m = M; m < padded; m++) k[c * pitch + m] = 0;
      }
      float* sums = received ? &seen[task * pitch] : nullptr;
      for (Index start = first; start < last; start += R) {
        const int n = std::min<Index>(R, last - start);
        Index token[R];
        for (int i = 0; i < n; i++) {
          token[i] = (b * H + qy0 + (start + i) / nqx) * W + qx0 + (start + i) % nqx;
          std::memcpy(&x[i * d], q + token[i] * q_stride + head * d, 4 * d);
        }
        for (Index m = 0; m < padded; m += PANEL)
          multiply(n, std::min(PANEL, padded - m), x.data(), d, &k[m], pitch, d, nullptr, false, &s[m], pitch);
        float norm[R];
        for (int i = 0; i < n; i++) norm[i] = exponentials(&s[i * pitch], M, sums);
        for (Index c = 0; c < wide; c += PANEL)
          multiply(n, std::min(PANEL, wide - c), s.data(), pitch, &v[c], wide, M, nullptr, false, &o[c], wide);
        for (int i = 0; i < n; i++) {
          float* to = out + token[i] * out_stride + head * d;
          for (Index c = 0; c < d; c++) to[c] = o[i * wide + c] * norm[i];
        }
      }
    }
    if (received) {
#pragma omp for schedule(static)
      for (Index bw = 0; bw < B * windows; bw++) {
        const Index b = bw / windows, y0 = bw % windows / cols * kh, x0 = bw % cols * kw;
        const Index nkx = std::min(kw, Wk - x0), M = std::min(kh, Hk - y0) * nkx;
        for (Index m = 0; m < M; m++) {
          float total = 0;
          for (Index t = 0; t < heads * parts; t++) total += seen[(bw * heads * parts + t) * pitch + m];
          const Index top = (y0 + m / nkx) * spread, left = (x0 + m % nkx) * spread;
          for (Index y = top; y < std::min(top + spread, H); y++)
            for (Index x = left; x < std::min(left + spread, W); x++)
              received[(b * H + y) * W + x] = total / (heads * wh * ww);
        }
      }
    }
  }
}

// Indices of (B, N) by ascending value; equal ones keep their order, and what is no number comes last. Radix sort.
void sgformer_order(const float* values, Index B, Index N, Index* order) {
#pragma omp parallel
  {
    std::vector<uint32_t> keys(N);
    std::vector<Index> other(N);
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < B; b++) {
      Index *from = order + b * N, *to = other.data();
      for (Index i = 0; i < N; i++) {
        const float value = values[b * N + i] + 0.f;  // -0 becomes 0
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        keys[i] = value != value ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;  // as unsigned numbers in the same order
        from[i] = i;
      }
      for (int shift = 0; shift < 32; shift += 8, std::swap(from, to)) {  // four passes: the result ends in `order`
        Index start[257] = {};
        for (Index i = 0; i < N; i++) start[(keys[i] >> shift & 255) + 1]++;
        for (int i = 0; i < 256; i++) start[i + 1] += start[i];
        for (Index i = 0; i < N; i++) to[start[keys[from[i]] >> shift & 255]++] = from[i];
      }
    }
  }
}

// out[b, g] = sum over k of weight[k] * x[b, members[b, g, k]] + bias, for one region; x (B, N, C), out (B, M, C), of which
// groups go to `at` and after. members (B, groups, rate) with a batch stride.
void sgformer_aggregate(const float* x, Index B, Index N, Index C, const Index* members, Index member_stride, Index groups,
                        Index rate, const float* weight, const float* bias, float* out, Index M, Index at) {
#pragma omp parallel for schedule(static) collapse(2)
  for (Index b = 0; b < B; b++)
    for (Index g = 0; g < groups; g++) {
      const Index* which = members + b * member_stride + g * rate;
      float* to = out + (b * M + at + g) * C;
      Index c = 0;
      for (; c + 2 * L <= C; c += 2 * L) {
        vec low = fill(*bias), high = low;
        for (Index r = 0; r < rate; r++) {
          const float* from = x + (b * N + which[r]) * C + c;
          low += load(from) * weight[r], high += load(from + L) * weight[r];
        }
        store(to + c, low), store(to + c + L, high);
      }
      for (; c < C; c++) {
        float total = *bias;
        for (Index r = 0; r < rate; r++) total += x[(b * N + which[r]) * C + c] * weight[r];
        to[c] = total;
      }
    }
}

// -- training -------------------------------------------------------------------------------------------------------

// Gradients of a linear map: of its weight (width, n), and its bias unless null, from those of its output (rows, width) and
// from its input x (rows, n), each with a row stride. `add`: to what is there.
void sgformer_linear_gradient(const float* gradient, Index gradient_stride, const float* x, Index x_stride, float* weight,
                              float* bias, Index rows, Index n, Index width, int add) {
  const Index panels = (n + PANEL - 1) / PANEL, groups = (width + R - 1) / R, depth = 128, near = 8 * depth;
  const Index most = std::max<Index>(1, std::min<Index>(8, groups * panels / (4 * threads())));
  Index blocks = (groups + most - 1) / most;
  while (blocks * panels % threads() && blocks < groups) blocks++;  // as many tasks for every thread
#pragma omp parallel
  for (Index start = 0; start < std::max<Index>(rows, 1); start += near) {  // all these rows give, while in the cache
    const Index end = std::min(rows, start + near);
    const bool more = add || start > 0;
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < blocks * panels; task++) {
      const Index c = task % panels * PANEL, real = std::min(PANEL, n - c), wide = (real + L - 1) / L * L;
      const Index block = task / panels, first = groups * block / blocks * R;
      const Index last = std::min(groups * (block + 1) / blocks * R, width);
      std::vector<float> made((last - first) * wide), sums(last - first), padded(wide == real ? 0 : depth * wide);
      for (Index k = start; k < end; k += depth) {
        const Index count = std::min(depth, end - k);
        const float* right = x + k * x_stride + c;
        for (Index r = 0; wide != real && r < count; r++) std::memcpy(&padded[r * wide], right + r * x_stride, 4 * real);
        const float *left = gradient + k * gradient_stride, *near_by = wide == real ? right : padded.data();
        const Index pitch = wide == real ? x_stride : wide;
        for (Index o = first; o < last; o += R) {
          const int tall = std::min<Index>(R, last - o);
          float* to = &made[(o - first) * wide];
          if (bias && c == 0)
            multiply_across<true>(tall, wide, left + o, gradient_stride, near_by, pitch, count, to, wide, &sums[o - first]);
          else
            multiply_across(tall, wide, left + o, gradient_stride, near_by, pitch, count, to, wide);
        }
      }
      for (Index o = first; o < last; o++) {
        float *to = weight + o * n + c, *from = &made[(o - first) * wide];
        for (Index i = 0; i < real; i++) to[i] = more ? to[i] + from[i] : from[i];
        if (bias && c == 0) bias[o] = more ? bias[o] + sums[o - first] : sums[o - first];
      }
    }
  }
}

// Gradients of a = GELU(depthwise convolution of h), and a again; without `a` of the convolution alone. From the gradient of
// the result comes that of h, which may take its place; each has a row stride, a is contiguous. made (B, 10, C): of every
// image the gradients of the 9 taps and of the bias.
void sgformer_depthwise_backward(const float* h, Index stride, const float* gradient, Index gradient_stride, float* out,
                                 Index out_stride, float* a, Index B, Index H, Index W, Index C, const float* weight,
                                 const float* bias, float* made) {
  const Index chunks = (C + CHUNK - 1) / CHUNK, row = (W + 2) * CHUNK;
#pragma omp parallel
  {
    std::vector<float> memory(7 * row);
    float *seen = memory.data(), *slopes = seen + 3 * row, *line = seen + 6 * row;  // rows of h, of gradients, of results
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * chunks; task++) {
      const Index chunk = task % chunks * CHUNK, image = task / chunks * H * W;
      const int n = std::min<Index>(CHUNK, C - chunk);
      float w[10 * CHUNK] = {}, total[10 * CHUNK] = {};
      for (int k = 0; k < 9; k++) std::memcpy(w + k * CHUNK, weight + k * C + chunk, 4 * n);
      if (a) std::memcpy(w + 9 * CHUNK, bias + chunk, 4 * n);
      std::fill(memory.begin(), memory.end(), 0.f);
      auto copy = [n](const float* from, float* to) {
        if (n == CHUNK)
          std::memcpy(to, from, 4 * CHUNK);
        else
          std::memcpy(to, from, 4 * n);
      };
      auto keep = [&](Index y) {
        float* to = seen + y % 3 * row + CHUNK;
        if (y >= H) {
          std::memset(to, 0, 4 * W * CHUNK);
          return;
        }
        const float* from = h + (image + y * W) * stride + chunk;
        for (Index x = 0; x < W; x++) {
          fetch(from + (x + W) * stride);
          copy(from + x * stride, to + x * CHUNK);
        }
      };
      keep(0);
      for (Index y = 0; y <= H; y++) {
        float* slope = slopes + y % 3 * row + CHUNK;
        if (y < H) {
          keep(y + 1);
          if (a) convolve_row(seen, y, W, n, w, CHUNK, w + 9 * CHUNK, line);
          for (Index x = 0; x < W; x++) {
            const float* from = gradient + (image + y * W + x) * gradient_stride + chunk;
            fetch(from + W * gradient_stride);
            copy(from, slope + x * CHUNK);
            if (!a) continue;
            float* to = a + (image + y * W + x) * C + chunk;
            fetch(to + W * C);
            for (int c = 0; c < n; c += L) {
              vec derivative, result = gelu(load(line + x * CHUNK + c), derivative);
              store(slope + x * CHUNK + c, load(slope + x * CHUNK + c) * derivative);
              n - c >= L ? store(to + c, result) : store(to + c, result, n - c);
            }
          }
          for (int c = 0; c < n; c += L) {
            const float *above = seen + (y + 2) % 3 * row + c, *here = seen + y % 3 * row + c,
                        *below = seen + (y + 1) % 3 * row + c;
            float* t = total + c;
            vec t0 = load(t), t1 = load(t + CHUNK), t2 = load(t + 2 * CHUNK), t3 = load(t + 3 * CHUNK), t4 = load(t + 4 * CHUNK),
                t5 = load(t + 5 * CHUNK), t6 = load(t + 6 * CHUNK), t7 = load(t + 7 * CHUNK), t8 = load(t + 8 * CHUNK),
                t9 = load(t + 9 * CHUNK);
            for (Index x = 0; x < W * CHUNK; x += CHUNK) {
              const vec g = load(slope + x + c);
              t0 += g * load(above + x), t1 += g * load(above + x + CHUNK), t2 += g * load(above + x + 2 * CHUNK);
              t3 += g * load(here + x), t4 += g * load(here + x + CHUNK), t5 += g * load(here + x + 2 * CHUNK);
              t6 += g * load(below + x), t7 += g * load(below + x + CHUNK), t8 += g * load(below + x + 2 * CHUNK);
              t9 += g;
            }
            store(t, t0), store(t + CHUNK, t1), store(t + 2 * CHUNK, t2), store(t + 3 * CHUNK, t3), store(t + 4 * CHUNK, t4);
            store(t + 5 * CHUNK, t5), store(t + 6 * CHUNK, t6), store(t + 7 * CHUNK, t7), store(t + 8 * CHUNK, t8);
            store(t + 9 * CHUNK, t9);
          }
        } else {
          std::memset(slope, 0, 4 * W * CHUNK);
        }
        if (y == 0) continue;
        convolve_row(slopes, y - 1, W, n, w + 8 * CHUNK, -CHUNK, nullptr, line);  // the same taps the other way round
        float* to = out + (image + (y - 1) * W) * out_stride + chunk;
        for (Index x = 0; x < W; x++) copy(line + x * CHUNK, to + x * out_stride);
      }
      for (int k = 0; k < 10; k++) std::memcpy(made + (task / chunks * 10 + k) * C + chunk, total + k * CHUNK, 4 * n);
    }
  }
}

// Gradients of sgformer_layer_norm without GELU: of x, and of weight and bias (C), from that of its result; `add`, unless
// null, is added to that of x. All (rows, C); out may be gradient or add.
void sgformer_layer_norm_backward(const float* x, const float* gradient, const float* add, float* out, Index rows, Index C,
                                  const float* weight, float eps, float* g_weight, float* g_bias) {
  const Index parts = std::min<Index>(64, (rows + 63) / 64), wide = (C + L - 1) / L * L;  // of any number of threads
  std::vector<float> sums(parts * 2 * wide);
#pragma omp parallel for schedule(dynamic)
  for (Index task = 0; task < parts; task++) {
    float *scaled = &sums[task * 2 * wide], *plain = scaled + wide;
    for (Index r = rows * task / parts; r < rows * (task + 1) / parts; r++) {
      const float *from = x + r * C, *slopes = gradient + r * C, *more = add ? add + r * C : nullptr;
      float *to = out + r * C, mean, scale;
      moments(from, C, eps, mean, scale);
      vec a = {}, b = {};
      auto sums_of = [&](Index c, vec y, vec g, vec w) {
        y = (y - mean) * scale;
        store(scaled + c, load(scaled + c) + g * y);
        store(plain + c, load(plain + c) + g);
        g *= w;
        a += g, b += g * y;
      };
      const Index whole = C / L * L;
      const int n = C - whole;
      for (Index c = 0; c < whole; c += L) sums_of(c, load(from + c), load(slopes + c), load(weight + c));
      if (n) sums_of(whole, load(from + whole, n), load(slopes + whole, n), load(weight + whole, n));
      const float one = sum(a) / C, two = sum(b) / C;
      auto made = [=](vec y, vec g, vec w, vec more) { return (g * w - one - (y - mean) * scale * two) * scale + more; };
      for (Index c = 0; c < whole; c += L)
        store(to + c, made(load(from + c), load(slopes + c), load(weight + c), more ? load(more + c) : vec{}));
      if (n)
        store(to + whole, made(load(from + whole, n), load(slopes + whole, n), load(weight + whole, n),
                               more ? load(more + whole, n) : vec{}), n);
    }
  }
  for (Index c = 0; c < C; c++) {
    float total[2] = {};
    for (Index task = 0; task < parts; task++)
      for (int i = 0; i < 2; i++) total[i] += sums[(2 * task + i) * wide + c];
    g_weight[c] = total[0], g_bias[c] = total[1];
  }
}

// Gradients of sgformer_group_norm: of x, and of weight and bias (C), from that of its result, which `out` may be.
void sgformer_group_norm_backward(const float* x, const float* gradient, float* out, Index B, Index N, Index C,
                                  const float* weight, const float* bias, float eps, int act, float* g_weight,
                                  float* g_bias) {
  const Index step = std::max<Index>(1, 16384 / C), parts = (N + step - 1) / step, wide = (C + L - 1) / L * L;
  std::vector<float> mean(B), scale(B), sums(B * parts * 2 * wide), one(B), two(B);
  group_moments(x, B, N, C, eps, mean.data(), scale.data());
#pragma omp parallel for schedule(static)
  for (Index task = 0; task < B * parts; task++) {  // through the GELU; sums over the tokens of a part
    const Index b = task / parts, first = b * N + task % parts * step, last = std::min(first + step, (b + 1) * N);
    float *plain = &sums[task * 2 * wide], *scaled = plain + wide;
    for (Index r = first; r < last; r++)
      for (Index c = 0; c < C; c += L) {
        const int n = std::min<Index>(L, C - c);
        const vec y = ((n == L ? load(x + r * C + c) : load(x + r * C + c, n)) - mean[b]) * scale[b];
        vec g = n == L ? load(gradient + r * C + c) : load(gradient + r * C + c, n);
        if (act) {
          vec derivative;
          gelu(y * (n == L ? load(weight + c) : load(weight + c, n)) + (n == L ? load(bias + c) : load(bias + c, n)), derivative);
          g *= derivative;
        }
        store(plain + c, load(plain + c) + g);
        store(scaled + c, load(scaled + c) + g * y);
        n == L ? store(out + r * C + c, g) : store(out + r * C + c, g, n);
      }
  }
  std::memset(g_weight, 0, 4 * C);
  std::memset(g_bias, 0, 4 * C);
  for (Index b = 0; b < B; b++) {
    double a = 0, s = 0;
    for (Index p = 0; p < parts; p++)
      for (Index c = 0; c < C; c++) {
        const float plain = sums[(b * parts + p) * 2 * wide + c], scaled = sums[((b * parts + p) * 2 + 1) * wide + c];
        g_bias[c] += plain, g_weight[c] += scaled;
        a += (double)plain * weight[c], s += (double)scaled * weight[c];
      }
    one[b] = a / ((double)N * C), two[b] = s / ((double)N * C);
  }
#pragma omp parallel for schedule(static)
  for (Index r = 0; r < B * N; r++) {
    const Index b = r / N;
    for (Index c = 0; c < C; c += L) {
      const int n = std::min<Index>(L, C - c);
      float* to = out + r * C + c;
      const vec y = ((n == L ? load(x + r * C + c) : load(x + r * C + c, n)) - mean[b]) * scale[b];
      const vec g = n == L ? load(to) * load(weight + c) : load(to, n) * load(weight + c, n);
      const vec made = (g - one[b] - y * two[b]) * scale[b];
      n == L ? store(to, made) : store(to, made, n);
    }
  }
}

// Gradients of sgformer_aggregate, arguments as there: of weight (rate) and bias, and added to g_x (B, N, C) that of x.
void sgformer_aggregate_backward(const float* x, const float* gradient, Index B, Index N, Index C, const Index* members,
                                 Index member_stride, Index groups, Index rate, const float* weight, float* g_x,
                                 float* g_weight, float* g_bias, Index M, Index at) {
  const Index part = 64, parts = (C + part - 1) / part;  // channels; a token may be of two groups, so images are not cut
  std::vector<float> sums(B * parts * (rate + 1));
#pragma omp parallel for schedule(dynamic)
  for (Index task = 0; task < B * parts; task++) {
    const Index b = task / parts, begin = task % parts * part, end = std::min(begin + part, C);
    float* mine = &sums[task * (rate + 1)];
    for (Index g = 0; g < groups; g++) {
      const float* from = gradient + (b * M + at + g) * C;
      vec total = {};
      for (Index r = 0; r <= rate; r++) {
        const Index token = r < rate ? (b * N + members[b * member_stride + g * rate + r]) * C : 0;
        vec dot = {};
        for (Index c = begin; c < end; c += L) {
          const int n = std::min<Index>(L, end - c);
          const vec v = n == L ? load(from + c) : load(from + c, n);
          if (r == rate) {
            total += v;
            continue;
          }
          dot += v * (n == L ? load(x + token + c) : load(x + token + c, n));
          float* to = g_x + token + c;
          n == L ? store(to, load(to) + v * weight[r]) : store(to, load(to, n) + v * weight[r], n);
        }
        mine[r] += sum(r < rate ? dot : total);
      }
    }
  }
  for (Index r = 0; r <= rate; r++) {
    double total = 0;
    for (Index task = 0; task < B * parts; task++) total += sums[task * (rate + 1) + r];
    (r < rate ? g_weight[r] : *g_bias) = total;
  }
}

// out = the sum of `parts` arrays of `size` floats, a multiple of L, that lie one after the other; for all threads together.
static void add_up(const float* sums, Index parts, Index size, float* out) {
#pragma omp for schedule(static)
  for (Index i = 0; i < size; i += L) {
    vec total = {};
    for (Index task = 0; task < parts; task++) total += load(sums + task * size + i);
    store(out + i, total);
  }
}

// Gradient of sgformer_winograd's weight, as 16 matrices (width, C) that are yet to be turned back by G^T U G.
void sgformer_winograd_gradient(const float* x, const float* gradient, Index B, Index H, Index W, Index C, float* out,
                                Index width) {
  const Index across = (W + 1) / 2, tiles = (H + 1) / 2 * across, all = B * tiles, T = 48;
  // So many parts whatever the number of threads, for the same bits; each has sums of its own.
  const Index parts = std::min<Index>(32, (all + 1023) / 1024), size = 16 * width * C;
  const std::vector<float> nothing(std::max(C, width));
  std::vector<float> sums(parts * size);
#pragma omp parallel
  {
    std::vector<float> seen(16 * T * C), made(16 * T * width);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < parts; task++) {
      const Index end = all * (task + 1) / parts;
      for (Index first = all * task / parts; first < end; first += T) {
        const Index count = std::min(T, end - first);
        for (Index t = 0; t < count; t++) {
          const Index b = (first + t) / tiles, tile = (first + t) % tiles, y = tile / across * 2, z = tile % across * 2;
          patch(x + b * H * W * C, H, W, C, y - 1, z - 1, nothing.data(), &seen[t * C], T * C);
          auto at = [&](Index i, Index j) {
            return y + i < H && z + j < W ? gradient + ((b * H + y + i) * W + z + j) * width : nothing.data();
          };
          for (Index c = 0; c < width; c += L) {  // A g A^T
            vec d[4][2];
            for (int j = 0; j < 2; j++) {
              const vec p = load(at(0, j) + c), q = load(at(1, j) + c);
              d[0][j] = p, d[1][j] = p + q, d[2][j] = p - q, d[3][j] = -q;
            }
            float* to = &made[t * width + c];
            for (int i = 0; i < 4; i++) {
              store(to + (4 * i) * T * width, d[i][0]);
              store(to + (4 * i + 1) * T * width, d[i][0] + d[i][1]);
              store(to + (4 * i + 2) * T * width, d[i][0] - d[i][1]);
              store(to + (4 * i + 3) * T * width, -d[i][1]);
            }
          }
        }
        for (Index i = 0; i < 16; i++)
          for (Index c = 0; c < C; c += PANEL)
            for (Index o = 0; o < width; o += R)
              multiply_across(std::min<Index>(R, width - o), std::min(PANEL, C - c), &made[i * T * width + o], width,
                              &seen[i * T * C + c], C, count, &sums[task * size + (i * width + o) * C + c], C);
      }
    }
    add_up(sums.data(), parts, size, out);
  }
}

// Gradient of a k x k convolution's weight, as k * k matrices (width, C), from its input x (B, H, W, C) and from that of its
// result (B, Ho, Wo, width). C is a multiple of L.
void sgformer_conv_gradient(const float* x, const float* gradient, Index B, Index H, Index W, Index C, Index k, Index step,
                            Index pad, Index Ho, Index Wo, float* out, Index width) {
  const Index rows = B * Ho, parts = std::min<Index>(32, (rows + 15) / 16), size = k * k * width * C;
  std::vector<float> sums(parts * size);  // as of sgformer_winograd_gradient
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < parts; task++)
      for (Index row = rows * task / parts; row < rows * (task + 1) / parts; row++)
        for (Index tap = 0; tap < k * k; tap++) {
          const Index y = row % Ho * step - pad + tap / k, shift = tap % k - pad;  // where the tap is; columns are p * step + shift
          const Index first = std::max<Index>(0, (step - 1 - shift) / step), last = std::min(Wo, (W - 1 - shift + step) / step);
          if (y < 0 || y >= H || first >= last) continue;
          const float* from = x + ((row / Ho * H + y) * W + first * step + shift) * C;
          float* to = &sums[(task * k * k + tap) * width * C];
          for (Index c = 0; c < C; c += PANEL)
            for (Index o = 0; o < width; o += R)
              multiply_across(std::min<Index>(R, width - o), std::min(PANEL, C - c), gradient + (row * Wo + first) * width + o,
                              width, from + c, step * C, last - first, to + o * C + c, C);
        }
    add_up(sums.data(), parts, size, out);
  }
}

// Gradients of what sgformer_attend makes of q, keys and values, from that of its output; arguments as there. The attention
// is computed again. gq is laid out as q, gkv as kv, each with a row stride; what they held is overwritten.
void sgformer_attend_backward(const float* q, Index q_stride, const float* kv, Index kv_stride, const float* gradient,
                              Index gradient_stride, float* gq, Index gq_stride, float* gkv, Index gkv_stride, Index B, Index H,
                              Index W, Index Hk, Index Wk, Index wh, Index ww, Index kh, Index kw, Index heads, Index d) {
  const Index rows = (H + wh - 1) / wh, cols = (W + ww - 1) / ww, windows = rows * cols, T = 8 * R;
  const Index keys = std::min(kh, Hk) * std::min(kw, Wk), pitch = (keys + L - 1) / L * L, wide = (d + L - 1) / L * L;
  const float scale = 1 / std::sqrt((float)d);
#pragma omp parallel
  {
    // Keys and values: as rows, and the other way round; queries and gradients of T rows; their attention, and its gradient.
    std::vector<float> k(pitch * wide), v(pitch * wide), kt(d * pitch), vt(d * pitch), x(T * wide), g(T * wide), p(T * pitch), s(T * pitch);
    std::vector<float> gk(pitch * wide), gv(pitch * wide), made(R * wide);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * windows * heads; task++) {
      const Index head = task % heads, win = task / heads % windows, b = task / heads / windows, wy = win / cols, wx = win % cols;
      const Index y0 = wy * kh, x0 = wx * kw, nkx = std::min(kw, Wk - x0), M = std::min(kh, Hk - y0) * nkx;
      const Index qy0 = wy * wh, qx0 = wx * ww, nqx = std::min(ww, W - qx0), nq = std::min(wh, H - qy0) * nqx;
      const Index padded = (M + L - 1) / L * L;
      auto key = [=](Index m) { return (b * Hk + y0 + m / nkx) * Wk + x0 + m % nkx; };
      auto token = [=](Index i) { return (b * H + qy0 + i / nqx) * W + qx0 + i % nqx; };
      for (Index m = 0; m < M; m++) {
        const float* from = kv + key(m) * kv_stride + head * d;
        std::memcpy(&k[m * wide], from, 4 * d);
        std::memcpy(&v[m * wide], from + heads * d, 4 * d);
      }
      for (Index c = 0; c < d; c++)
        for (Index m = 0; m < padded; m++) {
          kt[c * pitch + m] = m < M ? k[m * wide + c] * scale : 0;
          vt[c * pitch + m] = m < M ? v[m * wide + c] : 0;
        }
      std::fill(gk.begin(), gk.end(), 0.f);
      std::fill(gv.begin(), gv.end(), 0.f);
      for (Index first = 0; first < nq; first += T) {
        const Index count = std::min(T, nq - first);
        for (Index i = 0; i < count; i++) {
          std::memcpy(&x[i * wide], q + token(first + i) * q_stride + head * d, 4 * d);
          std::memcpy(&g[i * wide], gradient + token(first + i) * gradient_stride + head * d, 4 * d);
        }
        for (Index r = 0; r < count; r += R) {
          const int n = std::min<Index>(R, count - r);
          for (Index m = 0; m < padded; m += PANEL) {
            const int across = std::min(PANEL, padded - m);
            multiply(n, across, &x[r * wide], wide, &kt[m], pitch, d, nullptr, false, &p[r * pitch + m], pitch);
            multiply(n, across, &g[r * wide], wide, &vt[m], pitch, d, nullptr, false, &s[r * pitch + m], pitch);
          }
          for (Index i = r; i < r + n; i++) {  // of a softmax p with gradient s: p (s - sum of p s)
            float *weights = &p[i * pitch], *slopes = &s[i * pitch];
            const float norm = exponentials(weights, M, nullptr);
            vec total = {};
            for (Index m = 0; m < padded; m += L) {
              const vec w = load(weights + m) * norm;
              store(weights + m, w);
              total += w * load(slopes + m);
            }
            const float mean = sum(total);
            for (Index m = 0; m < padded; m += L)
              store(slopes + m, load(weights + m) * (load(slopes + m) - mean) * scale);
          }
          for (Index c = 0; c < wide; c += PANEL)
            multiply(n, std::min(PANEL, wide - c), &s[r * pitch], pitch, &k[c], wide, M, nullptr, false, &made[c], wide);
          for (int i = 0; i < n; i++)
            std::memcpy(gq + token(first + r + i) * gq_stride + head * d, &made[i * wide], 4 * d);
        }
        for (Index m = 0; m < M; m += R)
          for (Index c = 0; c < wide; c += PANEL) {
            const int n = std::min<Index>(R, M - m), across = std::min(PANEL, wide - c);
            multiply_across(n, across, &s[m], pitch, &x[c], wide, count, &gk[m * wide + c], wide);
            multiply_across(n, across, &p[m], pitch, &g[c], wide, count, &gv[m * wide + c], wide);
          }
      }
      for (Index m = 0; m < M; m++) {
        float* to = gkv + key(m) * gkv_stride + head * d;
        std::memcpy(to, &gk[m * wide], 4 * d);
        std::memcpy(to + heads * d, &gv[m * wide], 4 * d);
      }
    }
  }
}

// -- whole blocks ---------------------------------------------------------------------------------------------------
//
// One call for what are a dozen operations, so that the time from one to the next is not the caller's. `w` are pointers to
// parameters, two for every part: weight and bias. x (B, H, W, C) is read, y written; `scratch` is memory for what lies
// between: N (2 C + the widest) floats and what the attention needs. Grid: B, H, W, C, channels within the MLP, heads.

struct Grid {
  Index B, H, W, C, hidden, heads;
};

// What every block ends with: the local term (a slice of `wide`) and the output projection, both added; the MLP.
static void finish(const float* const* w, const Grid& g, const float* x, float* attended, const float* local, Index stride,
                   float* y, float* normed, float* wide, float eps) {
  const Index N = g.B * g.H * g.W, C = g.C;
  sgformer_depthwise_add(local, stride, attended, g.B, g.H, g.W, C, w[0], w[1]);
  sgformer_linear(attended, C, w[2], w[3], x, C, y, C, N, C, C);
  sgformer_layer_norm(y, normed, N, C, w[4], w[5], eps, 0);
  sgformer_linear(normed, C, w[6], w[7], nullptr, 0, wide, g.hidden, N, C, g.hidden);
  sgformer_depthwise_gelu(wide, wide, g.B, g.H, g.W, g.hidden, w[8], w[9]);
  sgformer_linear(wide, g.hidden, w[10], w[11], y, C, y, C, N, g.hidden, C);
}

// Parts: norm, proj_in, reduce, reduce_norm, kv_coarse, then those of `finish`: local, proj, norm, fc1, conv, fc2. `heads`
// are those of one scale; everywhere: coarse heads see all reduced tokens and not those of a window.
void sgformer_hybrid_block(const float* const* w, const Grid* grid, Index r, Index window, Index everywhere, const float* x,
                           float* y, float* coarse, float* fine, float* scratch, float eps, float reduce_eps) {
  const Grid& g = *grid;
  const Index C = g.C, N = g.B * g.H * g.W, Hr = (g.H + r - 1) / r, Wr = (g.W + r - 1) / r, Nr = g.B * Hr * Wr;
  float *normed = scratch, *attended = normed + N * C, *reduced = attended + N * C, *kv = reduced + Nr * C;
  float* wide = kv + Nr * C;  // coarse queries; fine queries, keys, values; local term
  sgformer_layer_norm(x, normed, N, C, w[0], w[1], eps, 0);
  sgformer_linear(normed, C, w[2], w[3], nullptr, 0, wide, 3 * C, N, C, 3 * C);
  sgformer_conv(normed, g.B, g.H, g.W, C, r, r, 0, w[4], w[5], kv, Hr, Wr, C);
  sgformer_layer_norm(kv, reduced, Nr, C, w[6], w[7], reduce_eps, 1);
  sgformer_linear(reduced, C, w[8], w[9], nullptr, 0, kv, C, Nr, C, C);
  const Index d = C / 2 / g.heads, far = window * r;
  sgformer_attend(wide, 3 * C, kv, C, attended, C, g.B, g.H, g.W, Hr, Wr, everywhere ? g.H : far, everywhere ? g.W : far,
                  everywhere ? Hr : window, everywhere ? Wr : window, g.heads, d, coarse, r);
  sgformer_attend(wide + C / 2, 3 * C, wide + C, 3 * C, attended + C / 2, C, g.B, g.H, g.W, g.H, g.W, window, window, window,
                  window, g.heads, d, fine, 1);
  finish(w + 10, g, x, attended, wide + 2 * C, 3 * C, y, normed, wide, eps);
}

// Parts: norm, proj_in, kv, those of `finish`, then the linear map of every region. `regions`: length and rate of each.
void sgformer_guided_block(const float* const* w, const Grid* grid, Index count, const Index* regions, const float* x,
                           const float* significance, float* y, float* scratch, float eps) {
  const Grid& g = *grid;
  const Index C = g.C, tokens = g.H * g.W, N = g.B * tokens;
  Index M = 0;
  for (Index i = 0; i < count; i++) M += (regions[2 * i] + regions[2 * i + 1] - 1) / regions[2 * i + 1];
  float *normed = scratch, *attended = normed + N * C, *few = attended + N * C, *kv = few + g.B * M * C;
  float* wide = kv + 2 * g.B * M * C;  // queries, local term
  sgformer_layer_norm(x, normed, N, C, w[0], w[1], eps, 0);
  sgformer_linear(normed, C, w[2], w[3], nullptr, 0, wide, 2 * C, N, C, 2 * C);
  std::vector<Index> order(N), members;
  sgformer_order(significance, g.B, tokens, order.data());
  for (Index i = 0, first = 0, at = 0; i < count; i++) {
    const Index length = regions[2 * i], rate = regions[2 * i + 1], groups = (length + rate - 1) / rate, all = groups * rate;
    members.resize(g.B * all);
    for (Index b = 0; b < g.B; b++)
      for (Index p = 0; p < all; p++)
        members[b * all + p] = order[b * tokens + first + (all == length ? p : (2 * p + 1) * length / (2 * all))];
    sgformer_aggregate(normed, g.B, tokens, C, members.data(), all, groups, rate, w[18 + 2 * i], w[19 + 2 * i], few, M, at);
    first += length, at += groups;
  }
  sgformer_linear(few, C, w[4], w[5], nullptr, 0, kv, 2 * C, g.B * M, C, 2 * C);
  sgformer_attend(wide, 2 * C, kv, 2 * C, attended, C, g.B, g.H, g.W, 1, M, g.H, g.W, 1, M, g.heads, C / g.heads, nullptr, 0);
  finish(w + 6, g, x, attended, wide + C, 2 * C, y, normed, wide, eps);
}

// Parts: norm, proj_in, those of `finish`.
void sgformer_plain_block(const float* const* w, const Grid* grid, const float* x, float* y, float* scratch, float eps) {
  const Grid& g = *grid;
  const Index C = g.C, N = g.B * g.H * g.W;
  float *normed = scratch, *attended = normed + N * C, *wide = attended + N * C;  // queries, keys, values, local term
  sgformer_layer_norm(x, normed, N, C, w[0], w[1], eps, 0);
  sgformer_linear(normed, C, w[2], w[3], nullptr, 0, wide, 4 * C, N, C, 4 * C);
  sgformer_attend(wide, 4 * C, wide + C, 4 * C, attended, C, g.B, g.H, g.W, g.H, g.W, g.H, g.W, g.H, g.W, g.heads, C / g.heads,
                  nullptr, 0);
  finish(w + 4, g, x, attended, wide + 3 * C, 4 * C, y, normed, wide, eps);
}

}  // extern "C"
