// Metal's vector types: float2, half4, uint3, ... as structs with elementwise operators.
#pragma once

template <class T>
struct vec2 {
  typedef T element;
  union {
    struct { T x, y; };
    struct { T r, g; };
    T e[2];
  };
  constexpr vec2() : x(0), y(0) {}
  constexpr vec2(T a) : x(a), y(a) {}
  template <class A, class B> constexpr vec2(A a, B b) : x(T(a)), y(T(b)) {}
  template <class U> explicit constexpr vec2(vec2<U> o) : x(T(o.x)), y(T(o.y)) {}
  T& operator[](unsigned i) { return e[i]; }
  T operator[](unsigned i) const { return e[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec3 { // takes the room of four
  typedef T element;
  union {
    struct { T x, y, z; };
    struct { T r, g, b; };
    vec2<T> xy;
    T e[3];
  };
  constexpr vec3() : x(0), y(0), z(0) {}
  constexpr vec3(T a) : x(a), y(a), z(a) {}
  template <class A, class B, class C> constexpr vec3(A a, B b, C c) : x(T(a)), y(T(b)), z(T(c)) {}
  template <class C> constexpr vec3(vec2<T> a, C c) : x(a.x), y(a.y), z(T(c)) {}
  template <class U> explicit constexpr vec3(vec3<U> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)) {}
  T& operator[](unsigned i) { return e[i]; }
  T operator[](unsigned i) const { return e[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec4 {
  typedef T element;
  union {
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    struct { vec2<T> xy, zw; };
    vec3<T> xyz;
    T e[4];
  };
  constexpr vec4() : x(0), y(0), z(0), w(0) {}
  constexpr vec4(T a) : x(a), y(a), z(a), w(a) {}
  template <class A, class B, class C, class D>
  constexpr vec4(A a, B b, C c, D d) : x(T(a)), y(T(b)), z(T(c)), w(T(d)) {}
  constexpr vec4(vec2<T> a, vec2<T> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  template <class D> constexpr vec4(vec3<T> a, D d) : x(a.x), y(a.y), z(a.z), w(T(d)) {}
  template <class U> explicit constexpr vec4(vec4<U> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)), w(T(o.w)) {}
  T& operator[](unsigned i) { return e[i]; }
  T operator[](unsigned i) const { return e[i]; }
};

namespace sim {
template <class V> struct lanes_of { static constexpr unsigned value = 0; };
template <class T> struct lanes_of<vec2<T>> { static constexpr unsigned value = 2; };
template <class T> struct lanes_of<vec3<T>> { static constexpr unsigned value = 3; };
template <class T> struct lanes_of<vec4<T>> { static constexpr unsigned value = 4; };
template <class V> constexpr bool is_vector_v = lanes_of<V>::value != 0;
template <class V> using if_vector = std::enable_if_t<is_vector_v<V>, int>;
template <class V, class F>
constexpr V each(F f) {
  V r;
  for (unsigned i = 0; i < lanes_of<V>::value; i++)
    r.e[i] = f(i);
  return r;
}
} // namespace sim

#define SIM_OPERATOR(o)                                                                                              \
  template <class V, sim::if_vector<V> = 0>                                                                          \
  constexpr V operator o(V a, V b) {                                                                                 \
    return sim::each<V>([&](unsigned i) { return typename V::element(a.e[i] o b.e[i]); });                           \
  }                                                                                                                  \
  template <class V, sim::if_vector<V> = 0>                                                                          \
  constexpr V operator o(V a, std::common_type_t<typename V::element> b) {                                           \
    return sim::each<V>([&](unsigned i) { return typename V::element(a.e[i] o b); });                                \
  }                                                                                                                  \
  template <class V, sim::if_vector<V> = 0>                                                                          \
  constexpr V operator o(std::common_type_t<typename V::element> a, V b) {                                           \
    return sim::each<V>([&](unsigned i) { return typename V::element(a o b.e[i]); });                                \
  }                                                                                                                  \
  template <class V, class U, sim::if_vector<V> = 0>                                                                 \
  constexpr V& operator o##=(V& a, U b) {                                                                            \
    return a = a o b;                                                                                                \
  }
SIM_OPERATOR(+)
SIM_OPERATOR(-)
SIM_OPERATOR(*)
SIM_OPERATOR(/)
#undef SIM_OPERATOR

template <class V, sim::if_vector<V> = 0>
constexpr V operator-(V a) {
  return sim::each<V>([&](unsigned i) { return typename V::element(-a.e[i]); });
}
template <class V, sim::if_vector<V> = 0>
constexpr bool operator==(V a, V b) {
  for (unsigned i = 0; i < sim::lanes_of<V>::value; i++)
    if (!(a.e[i] == b.e[i]))
      return false;
  return true;
}
template <class V, sim::if_vector<V> = 0>
constexpr bool operator!=(V a, V b) {
  return !(a == b);
}

#define SIM_VECTORS(T)      \
  typedef vec2<T> T##2;     \
  typedef vec3<T> T##3;     \
  typedef vec4<T> T##4;
SIM_VECTORS(float)
SIM_VECTORS(half)
SIM_VECTORS(bfloat)
SIM_VECTORS(bool)
SIM_VECTORS(char)
SIM_VECTORS(uchar)
SIM_VECTORS(short)
SIM_VECTORS(ushort)
SIM_VECTORS(int)
SIM_VECTORS(uint)
SIM_VECTORS(long)
SIM_VECTORS(ulong)
#undef SIM_VECTORS

struct packed_float3 {
  float x, y, z;
  operator float3() const { return {x, y, z}; }
};

namespace metal {
template <class T, int N> struct vec_of;
template <class T> struct vec_of<T, 2> { typedef vec2<T> type; };
template <class T> struct vec_of<T, 3> { typedef vec3<T> type; };
template <class T> struct vec_of<T, 4> { typedef vec4<T> type; };
template <class T, int N> using vec = typename vec_of<T, N>::type;
} // namespace metal
