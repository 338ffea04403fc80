// v3, after tiles.metal: nothing that a batch needs comes from the host. The order of a whole epoch lies on the device, and
// so does the number of rows that are behind, which every batch moves on; losses add up where they are. All batches but
// the last are therefore the same commands, and nobody has to wait before the epoch's end.

// x (m, n) and y (m): the rows of `images` and `classes` that come next in the epoch's order. A thread owns x[at.y][at.x].
kernel void gather_batch(device const float* images [[buffer(0)]], device const uint* classes [[buffer(1)]],
                         device const uint* order [[buffer(2)]], device const uint* behind [[buffer(3)]],
                         device float* x [[buffer(4)]], device uint* y [[buffer(5)]], constant uint* size [[buffer(6)]],
                         uint2 at [[thread_position_in_grid]]) {
  if (at.y >= size[0] || at.x >= size[1]) return;
  const uint row = order[behind[0] + at.y];
  x[at.y * size[1] + at.x] = images[row * size[1] + at.x];
  if (at.x == 0) y[at.y] = classes[row];
}

// loss (m) += each row's part of the batch's mean; behind += m. A SIMD group owns a row.
kernel void cross_entropy_grad(device const float* logits [[buffer(0)]], device const uint* classes [[buffer(1)]],
                               device float* d [[buffer(2)]], device float* loss [[buffer(3)]],
                               device uint* behind [[buffer(4)]], constant uint* size [[buffer(5)]],
                               uint2 at [[thread_position_in_grid]]) {
  const float found = cross_entropy_row(logits, classes, d, size, at);
  if (at.x == 0) loss[at.y] += found;
  if (at.x == 0 && at.y == 0) behind[0] += size[0];
}
