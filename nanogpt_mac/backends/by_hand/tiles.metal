// What v2 and v3 share: products in tiles that end in what used to be kernels of their own (bias, ReLU, its gradient, the
// bias's gradient, SGD), and the softmax's gradient by one SIMD group a row.
//
// A threadgroup of 16 x 16 threads owns a tile of the result, a thread one number of it. The threadgroup walks along k in
// slabs of 16: each thread brings one number of either operand into threadgroup memory, all wait for each other, and each
// reads from there what the others brought: a number that comes from device memory is used 16 times.
//
// Matrices are row-major. `size` is (m, n, k) of the product. The functions stand apart from the kernels because MLX's
// metal_kernel writes signatures of its own around them.
#include <metal_stdlib>
using namespace metal;

constant constexpr uint SIDE = 16;

// The thread's number at (at.y, at.x) of left (m, k) times right (k, n), where TURN_LEFT says that left lies as (k, m) and
// TURN_RIGHT that right lies as (n, k). With SUMS, row_sum gets the sum of left's row at.y. All threads must come here.
template <bool TURN_LEFT, bool TURN_RIGHT, bool SUMS>
float tile_product(device const float* left, device const float* right, constant const uint* size, uint2 at, uint2 lane,
                   threadgroup float* lefts, threadgroup float* rights, thread float& row_sum) {
  const uint m = size[0], n = size[1], depth = size[2];
  float sum = 0.0f;
  row_sum = 0.0f;
  for (uint slab = 0; slab < depth; slab += SIDE) {
    const uint across = slab + lane.x, down = slab + lane.y;  // beyond an edge everything counts as zero
    const bool has_left = at.y < m && across < depth, has_right = at.x < n && down < depth;
    lefts[lane.y * SIDE + lane.x] = has_left ? left[TURN_LEFT ? across * m + at.y : at.y * depth + across] : 0.0f;
    rights[lane.y * SIDE + lane.x] = has_right ? right[TURN_RIGHT ? at.x * depth + down : down * n + at.x] : 0.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 0; k < SIDE; k++) {
      sum += lefts[lane.y * SIDE + k] * rights[k * SIDE + lane.x];
      if (SUMS) row_sum += lefts[lane.y * SIDE + k];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the slab is overwritten
  }
  return sum;
}

// y (m, n) = x (m, k) times w (n, k) transposed, plus b (n); RELU: what is below zero becomes zero.
template <bool RELU>
void forward_tile(device const float* x, device const float* w, device const float* b, device float* y,
                  constant const uint* size, uint2 at, uint2 lane, threadgroup float* lefts, threadgroup float* rights) {
  float unused;
  const float sum = tile_product<false, true, false>(x, w, size, at, lane, lefts, rights, unused);
  if (at.y >= size[0] || at.x >= size[1]) return;
  y[at.y * size[1] + at.x] = RELU ? max(sum + b[at.x], 0.0f) : sum + b[at.x];
}

// dx (m, n) = dy (m, k) times w (k, n), zero where the ReLU's result x (m, n) is. It needs w as it was in the forward pass.
inline void backward_input_tile(device const float* dy, device const float* w, device const float* x, device float* dx,
                                constant const uint* size, uint2 at, uint2 lane, threadgroup float* lefts,
                                threadgroup float* rights) {
  float unused;
  const float sum = tile_product<false, false, false>(dy, w, size, at, lane, lefts, rights, unused);
  if (at.y < size[0] && at.x < size[1]) dx[at.y * size[1] + at.x] = x[at.y * size[1] + at.x] > 0.0f ? sum : 0.0f;
}

// SGD: to (m, n) = w - rate dy (k, m) transposed times x (k, n), to_b (m) = b - rate the sums of dy's columns, which the
// first column of threads owns. `to` and `to_b` may be w and b.
inline void backward_weight_tile(device const float* dy, device const float* x, device const float* w,
                                 device const float* b, device float* to, device float* to_b, constant const uint* size,
                                 float rate, uint2 at, uint2 lane, threadgroup float* lefts, threadgroup float* rights) {
  float row_sum;
  const float sum = tile_product<true, false, true>(dy, x, size, at, lane, lefts, rights, row_sum);
  if (at.y >= size[0] || at.x >= size[1]) return;
  to[at.y * size[1] + at.x] = w[at.y * size[1] + at.x] - rate * sum;
  if (at.x == 0) to_b[at.y] = b[at.y] - rate * row_sum;
}

// Of row at.y of logits (m, n), whose SIMD group has the lanes at.x: the row's part of the mean cross entropy, and in d
// (m, n) its gradient by the logits. A lane owns every 32nd number of the row. (MLX puts fewer than 8 classes elsewhere.)
template <typename Classes>
float cross_entropy_row(device const float* logits, Classes classes, device float* d,
                               constant const uint* size, uint2 at) {
  const uint m = size[0], n = size[1], row = at.y * n, right = classes[at.y];
  float largest = -INFINITY, sum = 0.0f;
  for (uint i = at.x; i < n; i += 32) largest = max(largest, logits[row + i]);
  largest = simd_max(largest);
  for (uint i = at.x; i < n; i += 32) sum += exp(logits[row + i] - largest);
  sum = simd_sum(sum);
  for (uint i = at.x; i < n; i += 32)
    d[row + i] = (exp(logits[row + i] - largest) / sum - (i == right ? 1.0f : 0.0f)) / float(m);
  return (log(sum) + largest - logits[row + right]) / float(m);
}

kernel void linear_relu(device const float* x [[buffer(0)]], device const float* w [[buffer(1)]],
                        device const float* b [[buffer(2)]], device float* y [[buffer(3)]],
                        constant uint* size [[buffer(4)]], uint2 at [[thread_position_in_grid]],
                        uint2 lane [[thread_position_in_threadgroup]]) {
  threadgroup float lefts[SIDE * SIDE];
  threadgroup float rights[SIDE * SIDE];
  forward_tile<true>(x, w, b, y, size, at, lane, lefts, rights);
}

kernel void linear(device const float* x [[buffer(0)]], device const float* w [[buffer(1)]],
                   device const float* b [[buffer(2)]], device float* y [[buffer(3)]], constant uint* size [[buffer(4)]],
                   uint2 at [[thread_position_in_grid]], uint2 lane [[thread_position_in_threadgroup]]) {
  threadgroup float lefts[SIDE * SIDE];
  threadgroup float rights[SIDE * SIDE];
  forward_tile<false>(x, w, b, y, size, at, lane, lefts, rights);
}

kernel void linear_backward_input(device const float* dy [[buffer(0)]], device const float* w [[buffer(1)]],
                                  device const float* x [[buffer(2)]], device float* dx [[buffer(3)]],
                                  constant uint* size [[buffer(4)]], uint2 at [[thread_position_in_grid]],
                                  uint2 lane [[thread_position_in_threadgroup]]) {
  threadgroup float lefts[SIDE * SIDE];
  threadgroup float rights[SIDE * SIDE];
  backward_input_tile(dy, w, x, dx, size, at, lane, lefts, rights);
}

kernel void linear_backward_weight(device const float* dy [[buffer(0)]], device const float* x [[buffer(1)]],
                                   device float* w [[buffer(2)]], device float* b [[buffer(3)]],
                                   constant uint* size [[buffer(4)]], constant float& rate [[buffer(5)]],
                                   uint2 at [[thread_position_in_grid]],
                                   uint2 lane [[thread_position_in_threadgroup]]) {
  threadgroup float lefts[SIDE * SIDE];
  threadgroup float rights[SIDE * SIDE];
  backward_weight_tile(dy, x, w, b, w, b, size, rate, at, lane, lefts, rights);
}
