// Linear maps with operands of 16 and 8 bits, on processors with AVX512-BF16 and AVX512-VNNI, and with AMX.
//
// Tokens arrive and leave in float32. Each is converted once, into memory of the call, and multiplied with all columns
// of the weight, which was converted and packed beforehand. A processor's instruction multiplies GROUP operands that
// lie side by side and adds them to one sum of 32 bits; one of AMX's does so for ROWS tokens and a vector of columns,
// over TILE groups, whose order in memory is the same.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemm.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_BF16 1
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define HAS_INT8 1
#endif
#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(HAS_BF16) && defined(HAS_INT8)
#define HAS_TILES 1
#endif

namespace {

#if defined(HAS_BF16) || defined(HAS_INT8)
// The next L of n floats, then zeros.
inline __m512 load_next(const float* p, Index n) {
  return (__m512)(n >= L ? load(p) : load(p, (int)n));
}
#endif

// How a token's numbers were converted: x = scale * (number - zero).
struct Scale {
  float scale, zero;
};

#ifdef HAS_BF16
// bfloat16. Two multiply-adds of float32 take the place of one of pairs where the latter is slower.
template <bool PAIRS>
struct Bf16 {
  static constexpr Index GROUP = 2, PARTS = PAIRS ? 1 : 2;  // PARTS: words of a token per group
  static constexpr Index ROWS = MR, TILE = 1;
  typedef vec Sum;
  static const char* panels(const char* packed, Index) { return packed; }
  static inline Sum add(Sum sum, __m512i x, __m512i w) {
    if constexpr (PAIRS) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    return (vec)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
  }
  static inline __m512i part(__m512i w, int part) {
    if constexpr (PAIRS) return w;
    return part ? _mm512_and_si512(w, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(w, 16);
  }
  static Scale convert(const float* x, Index n, char* out) {
    for (Index i = 0; i < n; i += L) {
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(load_next(x + i, n - i));
      if (PAIRS)
        _mm256_storeu_si256((__m256i*)(out + 2 * i), half);
      else
        _mm512_storeu_si512(out + 4 * i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    return {};
  }
  // Columns from c on of `width`: what the sums become, before the bias.
  struct Columns {
    Columns(const char*, Index, Index) {}
    inline __m512 value(Sum sum, Scale, int) const { return (__m512)sum; }
  };
};
#endif

#ifdef HAS_INT8
// 8-bit integers: tokens without sign, of their own scale and zero; weights with sign, of a scale per column. Packed:
// the columns' scales, the sums of their weights, both float, and the weights.
struct Int8 {
  static constexpr Index GROUP = 4, PARTS = 1, ROWS = MR, TILE = 1;
  typedef ivec Sum;
  static const char* panels(const char* packed, Index width) { return packed + 8 * round_up(width); }
  static inline Sum add(Sum sum, __m512i x, __m512i w) { return (ivec)_mm512_dpbusd_epi32((__m512i)sum, x, w); }
  static inline __m512i part(__m512i w, int) { return w; }
  static Scale convert(const float* x, Index n, char* out) {
    __m512 low = _mm512_setzero_ps(), high = low, low2 = low, high2 = low;
    __mmask16 strange = 0;
    Index i = 0;
    for (; i + 2 * L <= n; i += 2 * L) {
      const __m512 v = _mm512_loadu_ps(x + i), u = _mm512_loadu_ps(x + i + L);
      low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
      low2 = _mm512_min_ps(low2, u), high2 = _mm512_max_ps(high2, u);
      strange |= _mm512_cmp_ps_mask(v, u, _CMP_UNORD_Q);  // a NaN, which neither of these keeps
    }
    for (; i < n; i += L) {
      const __m512 v = load_next(x + i, n - i);
      low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
      strange |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    low = _mm512_min_ps(low, low2), high = _mm512_max_ps(high, high2);
    const float least = -reduce_max(-(vec)low), range = strange ? NAN : reduce_max((vec)high) - least;
    const float scale = range / 255, inverse = scale > 1e-30f ? 1 / scale : 0;
    const float zero = std::nearbyint(-least * inverse);
    const __m512i shift = _mm512_cvtps_epi32(_mm512_set1_ps(zero)), zeros = _mm512_setzero_si512();
    auto number = [=](__m512 v) {
      return _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse))), shift);
    };
    // Four vectors to one, each step within quarters of vectors, whose order is mended at last.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (i = 0; i + 4 * L <= n; i += 4 * L) {
      const __m512i a = number(_mm512_loadu_ps(x + i)), b = number(_mm512_loadu_ps(x + i + L));
      const __m512i c = number(_mm512_loadu_ps(x + i + 2 * L)), d = number(_mm512_loadu_ps(x + i + 3 * L));
      const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(order, bytes));
    }
    for (; i < n; i += L) {
      const __m512i shifted = _mm512_max_epi32(number(load_next(x + i, n - i)), zeros);
      _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtusepi32_epi8(shifted));
    }
    return {scale, zero};
  }
  struct Columns {
    __m512 scales[V], sums[V];
    Columns(const char* packed, Index width, Index c) {
      const Index wide = round_up(width);
      const float* from = (const float*)packed + c;
      for (int j = 0; j < V && c + j * L < wide; j++)
        scales[j] = (__m512)load(from + j * L), sums[j] = (__m512)load(from + wide + j * L);
    }
    inline __m512 value(Sum sum, Scale token, int j) const {
      const __m512 product = _mm512_fnmadd_ps(_mm512_set1_ps(token.zero), sums[j], _mm512_cvtepi32_ps((__m512i)sum));
      return _mm512_mul_ps(_mm512_mul_ps(product, _mm512_set1_ps(token.scale)), scales[j]);
    }
  };
};
#endif

#ifdef HAS_TILES
struct Bf16Tiles : Bf16<true> {
  static constexpr Index ROWS = 16, TILE = 16;
  static constexpr bool FLOATS = true;
};
struct Int8Tiles : Int8 {
  static constexpr Index ROWS = 16, TILE = 16;
  static constexpr bool FLOATS = false;
};

// All tiles have 16 rows of 64 bytes, between the two calls of a thread.
inline void begin_tiles() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}
#endif

#if defined(HAS_BF16) || defined(HAS_INT8)

// Where the results of some rows and columns go, and what is added to them: `bias` and, unless null, `add`, from the
// first of these rows and columns on. Of the last vector of columns only the first `last` exist.
struct Target {
  const float *bias, *add;
  float* out;
  Index add_stride, out_stride;
  __mmask16 last;
};

// Up to four vectors of sums side by side, each a variable of its own, as in gemm.h.
template <class Kind, int K>
struct Sums {
  typename Kind::Sum a, b, c, d;
  INLINE void add(__m512i x, __m512i w0, __m512i w1, __m512i w2, __m512i w3) {
    a = Kind::add(a, x, w0);
    if (K > 1) b = Kind::add(b, x, w1);
    if (K > 2) c = Kind::add(c, x, w2);
    if (K > 3) d = Kind::add(d, x, w3);
  }
  INLINE void finish(const typename Kind::Columns& columns, Scale scale, const Target& to, Index row) const {
    finish<0>(a, columns, scale, to, row);
    if (K > 1) finish<1>(b, columns, scale, to, row);
    if (K > 2) finish<2>(c, columns, scale, to, row);
    if (K > 3) finish<3>(d, columns, scale, to, row);
  }
  template <int J>
  static INLINE void finish(typename Kind::Sum sum, const typename Kind::Columns& columns, Scale scale,
                            const Target& to, Index row) {
    const __mmask16 mask = J + 1 < K ? 0xffff : to.last;
    __m512 v = _mm512_add_ps(columns.value(sum, scale, J), _mm512_loadu_ps(to.bias + J * L));
    if (to.add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to.add + row * to.add_stride + J * L));
    _mm512_mask_storeu_ps(to.out + row * to.out_stride + J * L, mask, v);
  }
};

// M tokens times K vectors of columns. a: converted tokens, `lda` bytes from one to the next; b: a panel.
template <class Kind, int M, int K>
inline void narrow_gemm(const char* a, Index lda, const char* b, Index groups, const typename Kind::Columns& columns,
                        const Scale* scales, const Target& to) {
  Sums<Kind, K> r[6] = {};
  __m512i w0, w1, w2, w3;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define LOAD(j, w) \
  if (j < K) {                                                \
    w = Kind::part(_mm512_loadu_si512(b + 64 * j), part);     \
    IN_REGISTER(w);                                           \
  }
#define STEP(i)                                      \
  if (i < M) {                                       \
    int32_t word;                                    \
    std::memcpy(&word, a + i * lda, 4);              \
    __m512i x = _mm512_set1_epi32(word);             \
    IN_REGISTER(x);                                  \
    r[i].add(x, w0, w1, w2, w3);                     \
  }
#define END(i) \
  if (i < M) r[i].finish(columns, scales[i], to, i);  // called, it would read the sums from memory
  for (Index k = 0; k < groups; k++, b += 64 * K)
    for (int part = 0; part < Kind::PARTS; part++, a += 4) {
      LOAD(0, w0) LOAD(1, w1) LOAD(2, w2) LOAD(3, w3)
      EACH(STEP)
    }
  EACH(END)
#undef EACH
#undef LOAD
#undef STEP
#undef END
}

template <class Kind, int K>
inline void narrow_gemm(int rows, const char* a, Index lda, const char* b, Index groups,
                        const typename Kind::Columns& columns, const Scale* scales, const Target& to) {
  switch (rows) {
    case 1: return narrow_gemm<Kind, 1, K>(a, lda, b, groups, columns, scales, to);
    case 2: return narrow_gemm<Kind, 2, K>(a, lda, b, groups, columns, scales, to);
    case 3: return narrow_gemm<Kind, 3, K>(a, lda, b, groups, columns, scales, to);
    case 4: return narrow_gemm<Kind, 4, K>(a, lda, b, groups, columns, scales, to);
    case 5: return narrow_gemm<Kind, 5, K>(a, lda, b, groups, columns, scales, to);
    case 6: return narrow_gemm<Kind, 6, K>(a, lda, b, groups, columns, scales, to);
  }
}

#ifdef HAS_TILES
// Up to 16 tokens times K vectors of columns. What follows the tokens' last group is zero, and `rest` is the panel's
// last groups, filled up with zeros, too.
template <class Kind, int K>
inline void tile_gemm(int rows, const char* a, Index lda, const char* b, const char* rest, Index groups,
                      const typename Kind::Columns& columns, const Scale* scales, const Target& to) {
  asm volatile("" ::: "memory");  // what loads a tile does not say that it reads memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define MULTIPLY(j, tile)                                    \
  if (j < K) {                                               \
    _tile_loadd(tile, from + 64 * j, 64 * K);                \
    if (Kind::FLOATS)                                        \
      _tile_dpbf16ps(j, 4, tile);                            \
    else                                                     \
      _tile_dpbusd(j, 4, tile);                              \
  }
  for (Index k = 0; k < groups; k += Kind::TILE, a += 64, b += 64 * K * Kind::TILE) {
    const char* from = k + Kind::TILE <= groups ? b : rest;
    _tile_loadd(4, a, lda);
    MULTIPLY(0, 5) MULTIPLY(1, 6) MULTIPLY(2, 7) MULTIPLY(3, 5)
  }
#undef MULTIPLY
  alignas(64) typename Kind::Sum sums[4][16];
  _tile_stored(0, sums[0], 64);
  if (K > 1) _tile_stored(1, sums[1], 64);
  if (K > 2) _tile_stored(2, sums[2], 64);
  if (K > 3) _tile_stored(3, sums[3], 64);
  for (int i = 0; i < rows; i++)
    Sums<Kind, K>{sums[0][i], sums[1][i], sums[2][i], sums[3][i]}.finish(columns, scales[i], to, i);
}
#endif

// A block's rows of a panel.
template <class Kind, int K>
inline void multiply(int rows, const char* a, Index lda, const char* b, const char* rest, Index groups,
                     const typename Kind::Columns& columns, const Scale* scales, const Target& to) {
#ifdef HAS_TILES
  if constexpr (Kind::TILE > 1) return tile_gemm<Kind, K>(rows, a, lda, b, rest, groups, columns, scales, to);
#endif
  if constexpr (Kind::TILE == 1) narrow_gemm<Kind, K>(rows, a, lda, b, groups, columns, scales, to);
}

// out (rows, width) = tokens (rows, n) times the weight, plus bias, plus `add`. source(row, memory for n floats): where
// the token is.
template <class Kind, class Source>
void narrow_map(const Source& source, Affine map, ConstView add, View out, Index rows, Index n, Index width) {
  const Index groups = (n + Kind::GROUP - 1) / Kind::GROUP, pitch = (4 * Kind::PARTS * groups + 63) / 64 * 64;
  const Index panels = (width + NR - 1) / NR, padded = round_up(width), tiles = (rows + Kind::ROWS - 1) / Kind::ROWS;
  const Index most = std::max<Index>(1, 65536 / pitch / Kind::ROWS), blocks = (tiles + most - 1) / most;
  const Index cuts = blocks < 4 * threads() ? panels : 1;  // as of sgformer_linear
  const char *packed = (const char*)map.weight, *weights = Kind::panels(packed, width);
  // Converted tokens: of all rows if threads share them, else of a thread's present block.
  const Index kept = (cuts > 1 ? tiles : std::min(most, tiles)) * Kind::ROWS;
  const auto make = [=] { return std::unique_ptr<char[]>(new char[kept * pitch + 64]); };
  const std::unique_ptr<char[]> shared = cuts > 1 ? make() : nullptr;
  const std::unique_ptr<Scale[]> shared_scales(cuts > 1 ? new Scale[kept] : nullptr);
#pragma omp parallel
  {
    std::vector<float> memory(n);
    const std::unique_ptr<char[]> own = cuts > 1 ? nullptr : make();
    const std::unique_ptr<Scale[]> own_scales(cuts > 1 ? nullptr : new Scale[kept]);
    char* tokens = cuts > 1 ? shared.get() : own.get();
    tokens += (64 - (uintptr_t)tokens % 64) % 64;
    Scale* scales = cuts > 1 ? shared_scales.get() : own_scales.get();
    alignas(64) char rest[Kind::TILE > 1 ? 64 * V * Kind::TILE : 1];
#ifdef HAS_TILES
    if constexpr (Kind::TILE > 1) begin_tiles();
#endif
    auto convert = [&](Index first, Index last, Index from) {  // `from`: the first row of the memory
      for (Index r = first; r < last; r++) {
        char* to = tokens + (r - from) * pitch;
        const Index end = 4 * Kind::PARTS * groups;
        const Index last_word = end - 4 * Kind::PARTS;
        if (Kind::TILE > 1)
          std::memset(to + last_word, 0, pitch - last_word);
        else if (n % Kind::GROUP)
          std::memset(to + last_word, 0, 4 * Kind::PARTS);
        scales[r - from] = Kind::convert(source(r, memory.data()), n, to);
      }
    };
    if (cuts > 1) {
#pragma omp for schedule(static)
      for (Index t = 0; t < tiles; t++) convert(t * Kind::ROWS, std::min((t + 1) * Kind::ROWS, rows), 0);
    }
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < blocks * cuts; task++) {
      const Index block = task / cuts, cut = task % cuts;
      const Index first = tiles * block / blocks * Kind::ROWS;
      const Index last = std::min(tiles * (block + 1) / blocks * Kind::ROWS, rows);
      const Index from = cuts > 1 ? 0 : first;
      if (cuts == 1) convert(first, last, from);
      for (Index p = cut * panels / cuts; p < (cut + 1) * panels / cuts; p++) {
        const Index c = p * NR, wide = std::min(NR, padded - c), real = std::min(NR, width - c);
        const typename Kind::Columns columns(packed, width, c);
        const char* b = weights + 4 * groups * c;
        if (const Index left = groups % Kind::TILE) {
          std::memset(rest, 0, sizeof(rest));
          std::memcpy(rest, b + 4 * (groups - left) * wide, 4 * left * wide);
        }
        const Index share = (4 * groups * wide / ((last - first + Kind::ROWS - 1) / Kind::ROWS) + 63) / 64 * 64;
        const char* next = b + 4 * groups * wide;  // the next panel, fetched piece by piece meanwhile
        for (Index r = first; r < last; r += Kind::ROWS) {
          if (Kind::TILE == 1 && p + 1 < panels)
            for (Index i = 0; i < share; i += 64) __builtin_prefetch(next + i);
          next += share;
          const int count = std::min<Index>(Kind::ROWS, last - r);
          const char* a = tokens + (r - from) * pitch;
          const Scale* of = scales + (r - from);
          const Target to = {map.bias + c, add.data ? add.data + r * add.stride + c : nullptr,
                             out.data + r * out.stride + c, add.stride, out.stride,
                             (__mmask16)(0xffff >> (wide - real))};
          switch (wide / L) {
            case 1: multiply<Kind, 1>(count, a, pitch, b, rest, groups, columns, of, to); break;
            case 2: multiply<Kind, 2>(count, a, pitch, b, rest, groups, columns, of, to); break;
            case 3: multiply<Kind, 3>(count, a, pitch, b, rest, groups, columns, of, to); break;
            case 4: multiply<Kind, 4>(count, a, pitch, b, rest, groups, columns, of, to); break;
          }
        }
      }
    }
#ifdef HAS_TILES
    if constexpr (Kind::TILE > 1) _tile_release();
#endif
  }
}

#endif

template <class Source>
void narrow_map(Index kind, const Source& source, Affine map, ConstView add, View out, Index rows, Index n,
                Index width) {
  switch (kind) {
#ifdef HAS_BF16
    case 1: return narrow_map<Bf16<true>>(source, map, add, out, rows, n, width);
    case 2: return narrow_map<Bf16<false>>(source, map, add, out, rows, n, width);
#endif
#ifdef HAS_INT8
    case 3: return narrow_map<Int8>(source, map, add, out, rows, n, width);
#endif
#ifdef HAS_TILES
    case 4: return narrow_map<Bf16Tiles>(source, map, add, out, rows, n, width);
    case 5: return narrow_map<Int8Tiles>(source, map, add, out, rows, n, width);
#endif
  }
}

}  // namespace

int sgformer_has(Index kind) {
#ifdef HAS_BF16
  if (kind == 1 || kind == 2) return 1;
#endif
#ifdef HAS_INT8
  if (kind == 3) return 1;
#endif
#ifdef HAS_TILES
  if (kind == 4 || kind == 5) {  // the kernel keeps tiles for processes that asked
    static const bool granted = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return granted;
  }
#endif
  return kind == 0;
}

int sgformer_pairs_are_quick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return 1;
#endif
}

void sgformer_narrow_linear(Index kind, ConstView x, Affine map, ConstView add, View out, Index rows, Index n,
                            Index width) {
  if (!kind) return sgformer_linear(x, map, add, out, rows, n, width);
  narrow_map(kind, [=](Index row, float*) { return x.data + row * x.stride; }, map, add, out, rows, n, width);
}

void sgformer_narrow_conv(Index kind, const Conv& conv, const float* x, Affine map, float* out) {
  if (!kind) return sgformer_conv(conv, x, map, out);
  const Index n = conv.kernel * conv.kernel * conv.C, pixels = conv.B * conv.out_H * conv.out_W;
  auto patch = [&](Index p, float* memory) {
    im2col(conv, x, p, memory);
    return memory;
  };
  narrow_map(kind, patch, map, {nullptr, 0}, {out, conv.width}, pixels, n, conv.width);
}

void sgformer_narrow_norm_linear(Index kind, const float* x, Affine norm, float eps, Affine map, View out, Index rows,
                                 Index n, Index width, float* memory) {
  if (!kind) {
    sgformer_layer_norm(x, memory, rows, n, norm, eps, 0);
    return sgformer_linear({memory, n}, map, {nullptr, 0}, out, rows, n, width);
  }
  auto normalized = [=](Index row, float* to) {
    float mean, rstd;
    mean_rstd(x + row * n, n, eps, mean, rstd);
    normalize(x + row * n, to, n, mean, rstd, norm.weight, norm.bias, 0);
    return to;
  };
  narrow_map(kind, normalized, map, {nullptr, 0}, out, rows, n, width);
}
