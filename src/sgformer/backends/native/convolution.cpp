// Convolutions: by im2col and a matrix product, or by Winograd's algorithm, and the gradients of their weights.

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"

namespace {

// The input patch of output pixel p of all images, (kernel, kernel, C); zeros lie outside.
inline void im2col(const Conv& conv, const float* x, Index p, float* column) {
  const Index H = conv.H, W = conv.W, C = conv.C, k = conv.kernel, row = p / conv.out_W;
  const Index b = row / conv.out_H, y0 = row % conv.out_H * conv.stride - conv.padding;
  const Index x0 = p % conv.out_W * conv.stride - conv.padding;
  const Index left = std::max<Index>(0, -x0), right = std::min(k, W - x0);
  for (Index i = 0; i < k; i++) {
    float* to = column + i * k * C;
    if (y0 + i < 0 || y0 + i >= H) {
      std::memset(to, 0, 4 * k * C);
      continue;
    }
    std::memset(to, 0, 4 * left * C);
    copy(to + left * C, x + ((b * H + y0 + i) * W + x0 + left) * C, (right - left) * C);
    std::memset(to + right * C, 0, 4 * (k - right) * C);
  }
}

// out = the sum of `parts` arrays of `size` floats, a multiple of L, in a row. Called by all threads.
void sum_parts(const float* sums, Index parts, Index size, float* out) {
#pragma omp for schedule(static)
  for (Index i = 0; i < size; i += L) {
    vec total = {};
    for (Index part = 0; part < parts; part++) total += load(sums + part * size + i);
    store(out + i, total);
  }
}

}  // namespace

void sgformer_conv(const Conv& conv, const float* x, Affine map, float* out) {
  const Index n = conv.kernel * conv.kernel * conv.C, width = conv.width, pixels = conv.B * conv.out_H * conv.out_W;
  const Index tiles = (pixels + MR - 1) / MR;
  if (!pixels) return;
  const Index tall = std::max<Index>(1, std::min<Index>({32768 / n, tiles / (4 * threads()), 16}));
  const Index depth = 512, wide = round_up(width), blocks = (tiles + tall - 1) / tall;
  const Index panels = (width + NR - 1) / NR, cuts = std::min(panels, std::max<Index>(1, 4 * threads() / blocks));
#pragma omp parallel
  {
    std::vector<float> columns(tall * MR * n), products(tall * MR * wide);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < blocks * cuts; task++) {
      const Index first = task / cuts * tall * MR, last = std::min(first + tall * MR, pixels), cut = task % cuts;
      for (Index p = first; p < last; p++) im2col(conv, x, p, &columns[(p - first) * n]);
      for (Index from = 0; from < n; from += depth)
        for (Index panel = cut * panels / cuts; panel < (cut + 1) * panels / cuts; panel++) {
          const Index c = panel * NR, cols = std::min(NR, wide - c);
          for (Index r = first; r < last; r += MR)
            gemm(std::min<Index>(MR, last - r), cols, &columns[(r - first) * n + from], n,
                 map.weight + c * n + from * cols, cols, std::min(depth, n - from), from ? nullptr : map.bias + c,
                 from > 0, &products[(r - first) * wide + c], wide);
        }
      const Index begin = cut * panels / cuts * NR, end = std::min((cut + 1) * panels / cuts * NR, width);
      for (Index r = first; r < last; r++)
        copy(out + r * width + begin, &products[(r - first) * wide + begin], end - begin);
    }
  }
}

void sgformer_conv_gradient(const Conv& conv, const float* x, const float* grad, float* out) {
  const Index H = conv.H, W = conv.W, C = conv.C, k = conv.kernel, stride = conv.stride, width = conv.width;
  const Index out_H = conv.out_H, out_W = conv.out_W, rows = conv.B * out_H, size = k * k * width * C;
  // The number of parts does not depend on the threads, for the same bits; each has its own sums.
  const Index parts = std::min<Index>(32, (rows + 15) / 16);
  std::vector<float> sums(parts * size);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (Index part = 0; part < parts; part++)
      for (Index row = rows * part / parts; row < rows * (part + 1) / parts; row++)
        for (Index tap = 0; tap < k * k; tap++) {  // it meets row y and, of output pixel p, column p * stride + shift
          const Index y = row % out_H * stride - conv.padding + tap / k, shift = tap % k - conv.padding;
          const Index first = std::max<Index>(0, (stride - 1 - shift) / stride);
          const Index last = std::min(out_W, (W - 1 - shift + stride) / stride);
          if (y < 0 || y >= H || first >= last) continue;
          const float* from = x + ((row / out_H * H + y) * W + first * stride + shift) * C;
          float* to = &sums[(part * k * k + tap) * width * C];
          for (Index c = 0; c < C; c += NR)
            for (Index o = 0; o < width; o += MR)
              gemm_tn(std::min<Index>(MR, width - o), std::min(NR, C - c), grad + (row * out_W + first) * width + o,
                      width, from + c, stride * C, last - first, to + o * C + c, C);
        }
    sum_parts(sums.data(), parts, size, out);
  }
}

// -- Winograd's F(2 x 2, 3 x 3): 16 products where there would be 36 ------------------------------------------------
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, whose names for the matrices these
// are. A tile is 2 x 2 outputs, made of 4 x 4 inputs d.

namespace {

// B^T d B of the inputs from row y and column z on of an image (H, W, C), `zeros` where there are none: 16 vectors of
// C, `pitch` apart.
void transform_input(const float* x, Index H, Index W, Index C, Index y, Index z, const float* zeros, float* out,
                     Index pitch) {
  const float* at[16];
  for (int i = 0; i < 16; i++) {
    const Index row = y + i / 4, col = z + i % 4;
    at[i] = row < 0 || row >= H || col < 0 || col >= W ? zeros : x + (row * W + col) * C;
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

// A^T m A, the 2 x 2 outputs from row y and column z on, of 16 vectors m of C, `pitch` apart; out (H, W, C).
inline void transform_output(const float* m, Index pitch, Index H, Index W, Index C, Index y, Index z, float* out) {
  float* to = out + (y * W + z) * C;
  for (Index c = 0; c < C; c += L) {
    const float* from = m + c;
    vec top[4], bottom[4];
    for (int j = 0; j < 4; j++) {  // A^T m
      const vec p = load(from + j * pitch), q = load(from + (4 + j) * pitch);
      const vec r = load(from + (8 + j) * pitch), s = load(from + (12 + j) * pitch);
      top[j] = p + q + r, bottom[j] = q - r - s;
    }
    store(to + c, top[0] + top[1] + top[2]);  // times A
    if (z + 1 < W) store(to + C + c, top[1] - top[2] - top[3]);
    if (y + 1 < H) store(to + W * C + c, bottom[0] + bottom[1] + bottom[2]);
    if (y + 1 < H && z + 1 < W) store(to + (W + 1) * C + c, bottom[1] - bottom[2] - bottom[3]);
  }
}

// A g A^T of the gradients g of 2 x 2 outputs, arguments as of `transform_input`.
inline void transform_gradient(const float* grad, Index H, Index W, Index C, Index y, Index z, const float* zeros,
                               float* out, Index pitch) {
  auto at = [&](Index i, Index j) { return y + i < H && z + j < W ? grad + ((y + i) * W + z + j) * C : zeros; };
  for (Index c = 0; c < C; c += L) {
    vec d[4][2];
    for (int j = 0; j < 2; j++) {
      const vec p = load(at(0, j) + c), q = load(at(1, j) + c);
      d[0][j] = p, d[1][j] = p + q, d[2][j] = p - q, d[3][j] = -q;
    }
    float* to = out + c;
    for (int i = 0; i < 4; i++) {
      store(to + (4 * i) * pitch, d[i][0]);
      store(to + (4 * i + 1) * pitch, d[i][0] + d[i][1]);
      store(to + (4 * i + 2) * pitch, d[i][0] - d[i][1]);
      store(to + (4 * i + 3) * pitch, -d[i][1]);
    }
  }
}

}  // namespace

void sgformer_winograd(const Grid& grid, const float* x, const float* weight, float* out, Index width) {
  const Index B = grid.B, H = grid.H, W = grid.W, C = grid.C;
  const Index across = (W + 1) / 2, tiles = (H + 1) / 2 * across, T = 4 * MR, blocks = (tiles + T - 1) / T;
  const std::vector<float> zeros(C);
#pragma omp parallel
  {
    std::vector<float> inputs(16 * T * C), products(16 * T * width);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * blocks; task++) {
      const Index b = task / blocks, first = task % blocks * T, count = std::min(T, tiles - first);
      for (Index t = 0; t < count; t++) {
        const Index y = (first + t) / across * 2, z = (first + t) % across * 2;
        transform_input(x + b * H * W * C, H, W, C, y - 1, z - 1, zeros.data(), &inputs[t * C], T * C);
      }
      for (Index i = 0; i < 16; i++)
        for (Index c = 0; c < width; c += NR) {
          const Index wide = std::min(NR, width - c);
          for (Index r = 0; r < count; r += MR)
            gemm(std::min<Index>(MR, count - r), wide, &inputs[(i * T + r) * C], C, weight + i * C * width + c * C,
                 wide, C, nullptr, false, &products[(i * T + r) * width + c], width);
        }
      for (Index t = 0; t < count; t++) {
        const Index y = (first + t) / across * 2, z = (first + t) % across * 2;
        transform_output(&products[t * width], T * width, H, W, width, y, z, out + b * H * W * width);
      }
    }
  }
}

void sgformer_winograd_gradient(const Grid& grid, const float* x, const float* grad, float* out, Index width) {
  const Index H = grid.H, W = grid.W, C = grid.C;
  const Index across = (W + 1) / 2, tiles = (H + 1) / 2 * across, all = grid.B * tiles, T = 48;
  const Index parts = std::min<Index>(32, (all + 1023) / 1024), size = 16 * width * C;  // as in sgformer_conv_gradient
  const std::vector<float> zeros(std::max(C, width));
  std::vector<float> sums(parts * size);
#pragma omp parallel
  {
    std::vector<float> inputs(16 * T * C), gradients(16 * T * width);
#pragma omp for schedule(dynamic)
    for (Index part = 0; part < parts; part++) {
      const Index end = all * (part + 1) / parts;
      for (Index first = all * part / parts; first < end; first += T) {
        const Index count = std::min(T, end - first);
        for (Index t = 0; t < count; t++) {
          const Index b = (first + t) / tiles, tile = (first + t) % tiles, y = tile / across * 2, z = tile % across * 2;
          transform_input(x + b * H * W * C, H, W, C, y - 1, z - 1, zeros.data(), &inputs[t * C], T * C);
          transform_gradient(grad + b * H * W * width, H, W, width, y, z, zeros.data(), &gradients[t * width],
                             T * width);
        }
        for (Index i = 0; i < 16; i++)
          for (Index c = 0; c < C; c += NR)
            for (Index o = 0; o < width; o += MR)
              gemm_tn(std::min<Index>(MR, width - o), std::min(NR, C - c), &gradients[i * T * width + o], width,
                      &inputs[i * T * C + c], C, count, &sums[part * size + (i * width + o) * C + c], C);
      }
    }
    sum_parts(sums.data(), parts, size, out);
  }
}
