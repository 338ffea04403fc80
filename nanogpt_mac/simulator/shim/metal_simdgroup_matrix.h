// Metal's matrices of 8 x 8 over a SIMD group: each of its 32 lanes holds two neighbours of a row.
//
// Which ones Metal leaves open; this is the layout that Apple's chips are known to have (MLX's steel kernels and
// metal-flash-attention rely on it). Products are summed in float32, in the order of k; Apple's order is not known.
#pragma once

namespace metal {

namespace sim_matrix {
struct At { unsigned row, column; };
inline At of(unsigned lane) {
  const unsigned quad = lane / 4;
  return {(quad & 4) + lane / 2 % 4, (quad & 2) * 2 + lane % 2 * 2};
}
inline At here() { return of(sim::group.lane->index % sim::kSimdWidth); }
inline unsigned lane_of(unsigned row, unsigned column) { // that has an element
  return (row & 4) * 4 + row % 4 * 2 + (column & 4) * 2 + column / 2 % 2;
}
// Of an 8 x 8 matrix in memory, the element that a lane has as its number i.
inline ulong offset(At at, unsigned i, ulong stride, ulong2 origin, bool transposed) {
  const ulong row = transposed ? at.column + i : at.row, column = transposed ? at.row : at.column + i;
  return (origin.y + row) * stride + origin.x + column;
}
inline unsigned whole(uint32_t active) { // all 32 lanes must take part
  if (active != 0xffffffffu)
    sim::fail("an operation on SIMD-group matrices without all 32 lanes");
  return active == 0xffffffffu;
}
} // namespace sim_matrix

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "SIMD-group matrices are 8 x 8");
  vec2<T> own;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    const auto at = sim_matrix::here();
    for (unsigned i = 0; i < 2; i++) own[i] = at.row == at.column + i ? diagonal : T(0);
  }
  vec2<T>& thread_elements() { return own; }
  const vec2<T>& thread_elements() const { return own; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> made;
  made.own = vec2<T>(value);
  return made;
}

template <class T, class M>
void simdgroup_load(simdgroup_matrix<M, 8, 8>& d, const T* from, ulong stride = 8, ulong2 origin = ulong2(0),
                    bool transposed = false, unsigned line = __builtin_LINE()) {
  sim_matrix::whole(sim::publish(true, kMatrix, line).active);
  for (unsigned i = 0; i < 2; i++) d.own[i] = from[sim_matrix::offset(sim_matrix::here(), i, stride, origin, transposed)];
}
template <class T, class M>
void simdgroup_store(const simdgroup_matrix<M, 8, 8>& a, T* to, ulong stride = 8, ulong2 origin = ulong2(0),
                     bool transposed = false, unsigned line = __builtin_LINE()) {
  sim_matrix::whole(sim::publish(true, kMatrix, line).active);
  for (unsigned i = 0; i < 2; i++) to[sim_matrix::offset(sim_matrix::here(), i, stride, origin, transposed)] = a.own[i];
}

// d = a b + c
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                   unsigned line = __builtin_LINE()) {
  struct Both { float a[2], b[2]; };
  const vec2<C> before = c.own; // d may be c, a or b
  const auto all = sim::publish(Both{{float(a.own[0]), float(a.own[1])}, {float(b.own[0]), float(b.own[1])}}, kMatrix, line);
  if (!sim_matrix::whole(all.active))
    return;
  const auto at = sim_matrix::here();
  for (unsigned i = 0; i < 2; i++) {
    float sum = float(before[i]);
    for (unsigned k = 0; k < 8; k++)
      sum += all[sim_matrix::lane_of(at.row, k)].a[k % 2] * all[sim_matrix::lane_of(k, at.column + i)].b[i];
    d.own[i] = D(sum);
  }
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                        const simdgroup_matrix<B, 8, 8>& b, unsigned line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f), line);
}

} // namespace metal
