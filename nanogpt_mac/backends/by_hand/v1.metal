// v1: the network as one writes it first. Eleven kernels, each one step of the formula; a thread owns one number of the
// result and reads all that it needs from device memory. launches.py says in which order they run.
//
// Matrices are row-major. `size` is (m, n, k): the result's rows and columns, and over how many terms it sums.
#include <metal_stdlib>
using namespace metal;

// c (m, n) = a (m, k) times b (n, k) transposed: a layer's product. A thread owns c[at.y][at.x], as in the next two.
kernel void matmul_nt(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                      device float* c [[buffer(2)]], constant uint* size [[buffer(3)]],
                      uint2 at [[thread_position_in_grid]]) {
  const uint n = size[1], depth = size[2];
  if (at.y >= size[0] || at.x >= n) return;
  float sum = 0.0f;
  for (uint k = 0; k < depth; k++) sum += a[at.y * depth + k] * b[at.x * depth + k];
  c[at.y * n + at.x] = sum;
}

// c (m, n) = a (k, m) transposed times b (k, n): the gradient of a layer's weights.
kernel void matmul_tn(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                      device float* c [[buffer(2)]], constant uint* size [[buffer(3)]],
                      uint2 at [[thread_position_in_grid]]) {
  const uint m = size[0], n = size[1];
  if (at.y >= m || at.x >= n) return;
  float sum = 0.0f;
  for (uint k = 0; k < size[2]; k++) sum += a[k * m + at.y] * b[k * n + at.x];
  c[at.y * n + at.x] = sum;
}

// c (m, n) = a (m, k) times b (k, n): the gradient of a layer's input.
kernel void matmul_nn(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                      device float* c [[buffer(2)]], constant uint* size [[buffer(3)]],
                      uint2 at [[thread_position_in_grid]]) {
  const uint n = size[1], depth = size[2];
  if (at.y >= size[0] || at.x >= n) return;
  float sum = 0.0f;
  for (uint k = 0; k < depth; k++) sum += a[at.y * depth + k] * b[k * n + at.x];
  c[at.y * n + at.x] = sum;
}

// y (m, n) += b (n). A thread owns y[at.y][at.x].
kernel void add_bias(device float* y [[buffer(0)]], device const float* b [[buffer(1)]],
                     constant uint* size [[buffer(2)]], uint2 at [[thread_position_in_grid]]) {
  if (at.y < size[0] && at.x < size[1]) y[at.y * size[1] + at.x] += b[at.x];
}

// y (m, n) = max(y, 0). A thread owns y[at.y][at.x].
kernel void relu(device float* y [[buffer(0)]], constant uint* size [[buffer(1)]],
                 uint2 at [[thread_position_in_grid]]) {
  if (at.y < size[0] && at.x < size[1]) y[at.y * size[1] + at.x] = max(y[at.y * size[1] + at.x], 0.0f);
}

// shares (m, n): of each row of logits. A thread owns a row.
kernel void softmax(device const float* logits [[buffer(0)]], device float* shares [[buffer(1)]],
                    constant uint* size [[buffer(2)]], uint2 at [[thread_position_in_grid]]) {
  const uint row = at.y, n = size[1];
  if (row >= size[0]) return;
  float largest = logits[row * n], sum = 0.0f;
  for (uint i = 1; i < n; i++) largest = max(largest, logits[row * n + i]);
  for (uint i = 0; i < n; i++) sum += exp(logits[row * n + i] - largest);
  for (uint i = 0; i < n; i++) shares[row * n + i] = exp(logits[row * n + i] - largest) / sum;
}

// loss (m): each row's part of the mean cross entropy. A thread owns a row.
kernel void cross_entropy(device const float* shares [[buffer(0)]], device const uint* classes [[buffer(1)]],
                          device float* loss [[buffer(2)]], constant uint* size [[buffer(3)]],
                          uint2 at [[thread_position_in_grid]]) {
  if (at.y < size[0]) loss[at.y] = -log(shares[at.y * size[1] + classes[at.y]]) / float(size[0]);
}

// d (m, n): the gradient of the mean loss by the logits. A thread owns d[at.y][at.x].
kernel void softmax_cross_entropy_backward(device const float* shares [[buffer(0)]],
                                           device const uint* classes [[buffer(1)]], device float* d [[buffer(2)]],
                                           constant uint* size [[buffer(3)]], uint2 at [[thread_position_in_grid]]) {
  if (at.y >= size[0] || at.x >= size[1]) return;
  const uint i = at.y * size[1] + at.x;
  d[i] = (shares[i] - (at.x == classes[at.y] ? 1.0f : 0.0f)) / float(size[0]);
}

// sums (n): of the columns of d (m, n), the gradient of a layer's bias. A thread owns a column.
kernel void column_sum(device const float* d [[buffer(0)]], device float* sums [[buffer(1)]],
                       constant uint* size [[buffer(2)]], uint2 at [[thread_position_in_grid]]) {
  if (at.x >= size[1]) return;
  float sum = 0.0f;
  for (uint row = 0; row < size[0]; row++) sum += d[row * size[1] + at.x];
  sums[at.x] = sum;
}

// d (m, n) = 0 where the ReLU's result x (m, n) is. A thread owns d[at.y][at.x].
kernel void relu_backward(device float* d [[buffer(0)]], device const float* x [[buffer(1)]],
                          constant uint* size [[buffer(2)]], uint2 at [[thread_position_in_grid]]) {
  const uint i = at.y * size[1] + at.x;
  if (at.y < size[0] && at.x < size[1] && !(x[i] > 0.0f)) d[i] = 0.0f;
}

// w (m, n) -= rate g (m, n). A thread owns w[at.y][at.x].
kernel void sgd(device float* w [[buffer(0)]], device const float* g [[buffer(1)]], constant uint* size [[buffer(2)]],
                constant float& rate [[buffer(3)]], uint2 at [[thread_position_in_grid]]) {
  if (at.y < size[0] && at.x < size[1]) w[at.y * size[1] + at.x] -= rate * g[at.y * size[1] + at.x];
}
