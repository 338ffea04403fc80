// C = A B of row-major matrices, (m, k) by (k, n), summed in float32 in the order of k.
//
// A threadgroup of 16 x 16 threads owns a tile of 64 x 64 numbers of C. It walks along k in slabs of 16: all threads
// bring a slab of A and one of B into threadgroup memory, wait for each other, and use it. Of the tile a thread owns
// 4 x 4 numbers, 16 apart, so that threads beside each other read numbers beside each other: for 8 numbers that it reads
// it does 16 multiplications.
#include <metal_stdlib>
using namespace metal;

constant constexpr int TILE = 64;
constant constexpr int DEPTH = 16;
constant constexpr int SIDE = 16;
constant constexpr int OWN = TILE / SIDE;

template <typename T>
kernel void product(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device T* c [[buffer(2)]],
                    constant long& m [[buffer(3)]], constant long& n [[buffer(4)]], constant long& k [[buffer(5)]],
                    uint2 tile [[threadgroup_position_in_grid]], uint2 at [[thread_position_in_threadgroup]]) {
  threadgroup float left[DEPTH][TILE];
  threadgroup float right[DEPTH][TILE];
  const long top = long(tile.y) * TILE, first = long(tile.x) * TILE;
  const int thread_index = int(at.y) * SIDE + int(at.x);
  float sums[OWN][OWN] = {};

  for (long slab = 0; slab < k; slab += DEPTH) {
    // What lies beyond an edge counts as zero, which changes no sum.
    for (int i = thread_index; i < TILE * DEPTH; i += SIDE * SIDE) {
      const long row = top + i / DEPTH, deep = slab + i % DEPTH;
      left[i % DEPTH][i / DEPTH] = row < m && deep < k ? float(a[row * k + deep]) : 0.0f;
    }
    for (int i = thread_index; i < TILE * DEPTH; i += SIDE * SIDE) {
      const long deep = slab + i / TILE, column = first + i % TILE;
      right[i / TILE][i % TILE] = deep < k && column < n ? float(b[deep * n + column]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = 0; d < DEPTH; d++) {
      float rows[OWN], columns[OWN];
      for (int i = 0; i < OWN; i++) {
        rows[i] = left[d][int(at.y) + SIDE * i];
        columns[i] = right[d][int(at.x) + SIDE * i];
      }
      for (int i = 0; i < OWN; i++)
        for (int j = 0; j < OWN; j++) sums[i][j] += rows[i] * columns[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the slab is overwritten
  }

  for (int i = 0; i < OWN; i++)
    for (int j = 0; j < OWN; j++) {
      const long row = top + at.y + SIDE * i, column = first + at.x + SIDE * j;
      if (row < m && column < n) c[row * n + column] = T(sums[i][j]);
    }
}

template [[host_name("product_float32")]] kernel void product<float>(
    device const float*, device const float*, device float*, constant long&, constant long&, constant long&, uint2, uint2);
template [[host_name("product_float16")]] kernel void product<half>(
    device const half*, device const half*, device half*, constant long&, constant long&, constant long&, uint2, uint2);
template [[host_name("product_bfloat16")]] kernel void product<bfloat>(
    device const bfloat*, device const bfloat*, device bfloat*, constant long&, constant long&, constant long&, uint2, uint2);
