// v2, after tiles.metal: the images stay on the device. The host writes which rows a batch has, submits all its kernels at
// once, waits, and reads the loss.

// x (m, n) and y (m): the rows of `images` and `classes` that order (m) names. A thread owns x[at.y][at.x].
kernel void gather_batch(device const float* images [[buffer(0)]], device const uint* classes [[buffer(1)]],
                         device const uint* order [[buffer(2)]], device float* x [[buffer(3)]],
                         device uint* y [[buffer(4)]], constant uint* size [[buffer(5)]],
                         uint2 at [[thread_position_in_grid]]) {
  if (at.y >= size[0] || at.x >= size[1]) return;
  x[at.y * size[1] + at.x] = images[order[at.y] * size[1] + at.x];
  if (at.x == 0) y[at.y] = classes[order[at.y]];
}

// loss (m): each row's part of the mean. A SIMD group owns a row.
kernel void cross_entropy_grad(device const float* logits [[buffer(0)]], device const uint* classes [[buffer(1)]],
                               device float* d [[buffer(2)]], device float* loss [[buffer(3)]],
                               constant uint* size [[buffer(4)]], uint2 at [[thread_position_in_grid]]) {
  const float found = cross_entropy_row(logits, classes, d, size, at);
  if (at.x == 0) loss[at.y] = found;
}
