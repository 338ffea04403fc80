// Metal's arithmetic functions and atomics. half and bfloat are computed in float.
#pragma once

namespace metal {

template <class T> using if_float = enable_if_t<is_floating_point_v<T>, int>;
template <class T> using if_int = enable_if_t<is_integral_v<T>, int>;
template <class T> using if_number = enable_if_t<is_arithmetic_v<T>, int>;
// Two numbers: their type where it is the same, else float if one is floating, else C++'s common type.
template <class A, class B>
struct common_of : std::conditional<is_floating_point_v<A> || is_floating_point_v<B>, float, decltype(A() + B())> {};
template <class A> struct common_of<A, A> { using type = A; };
template <class A, class B> using common_t = typename common_of<A, B>::type;

#define SIM_UNARY(name, expression)                                               \
  template <class T, if_float<T> = 0>                                             \
  inline T name(T value) {                                                        \
    const float x = float(value);                                                 \
    return T(expression);                                                         \
  }                                                                               \
  template <class V, sim::if_vector<V> = 0>                                       \
  inline V name(V v) {                                                            \
    return sim::each<V>([&](unsigned i) { return ::metal::name(v.e[i]); });       \
  }
#define SIM_UNARY_STD(name) SIM_UNARY(name, std::name(x))
#define SIM_BINARY(name, expression)                                                                      \
  template <class A, class B, enable_if_t<is_floating_point_v<common_t<A, B>>, int> = 0>                  \
  inline common_t<A, B> name(A first, B second) {                                                         \
    const float x = float(first), y = float(second);                                                      \
    return common_t<A, B>(expression);                                                                    \
  }                                                                                                       \
  template <class V, sim::if_vector<V> = 0>                                                               \
  inline V name(V a, V b) {                                                                               \
    return sim::each<V>([&](unsigned i) { return ::metal::name(a.e[i], b.e[i]); });                       \
  }

SIM_UNARY_STD(exp) SIM_UNARY_STD(exp2) SIM_UNARY_STD(log) SIM_UNARY_STD(log2) SIM_UNARY_STD(log10)
SIM_UNARY_STD(sqrt) SIM_UNARY_STD(sin) SIM_UNARY_STD(cos) SIM_UNARY_STD(tan) SIM_UNARY_STD(asin)
SIM_UNARY_STD(acos) SIM_UNARY_STD(atan) SIM_UNARY_STD(sinh) SIM_UNARY_STD(cosh) SIM_UNARY_STD(tanh)
SIM_UNARY_STD(asinh) SIM_UNARY_STD(acosh) SIM_UNARY_STD(atanh) SIM_UNARY_STD(floor) SIM_UNARY_STD(ceil)
SIM_UNARY_STD(round) SIM_UNARY_STD(rint) SIM_UNARY_STD(trunc) SIM_UNARY_STD(fabs)
SIM_UNARY(exp10, std::pow(10.0f, x)) SIM_UNARY(rsqrt, 1.0f / std::sqrt(x)) SIM_UNARY(fract, x - std::floor(x))
SIM_UNARY(sinpi, std::sin(M_PI_F * x)) SIM_UNARY(cospi, std::cos(M_PI_F * x)) SIM_UNARY(tanpi, std::tan(M_PI_F * x))
SIM_UNARY(saturate, x < 0 || x != x ? 0.0f : x > 1 ? 1.0f : x)
SIM_UNARY(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f)
SIM_BINARY(pow, std::pow(x, y)) SIM_BINARY(powr, std::pow(x, y)) SIM_BINARY(atan2, std::atan2(x, y))
SIM_BINARY(fmod, std::fmod(x, y)) SIM_BINARY(copysign, std::copysign(x, y)) SIM_BINARY(fmax, std::fmax(x, y))
SIM_BINARY(fmin, std::fmin(x, y)) SIM_BINARY(fdim, std::fdim(x, y)) SIM_BINARY(step, y < x ? 0.0f : 1.0f)
SIM_BINARY(max, std::fmax(x, y)) SIM_BINARY(min, std::fmin(x, y)) SIM_BINARY(nextafter, std::nextafter(x, y))
#undef SIM_UNARY_STD

template <class A, class B, if_int<A> = 0, if_int<B> = 0>
inline common_t<A, B> max(A a, B b) { return common_t<A, B>(a) < common_t<A, B>(b) ? b : a; }
template <class A, class B, if_int<A> = 0, if_int<B> = 0>
inline common_t<A, B> min(A a, B b) { return common_t<A, B>(b) < common_t<A, B>(a) ? b : a; }
template <class T> inline T max3(T a, T b, T c) { return metal::max(metal::max(a, b), c); }
template <class T> inline T min3(T a, T b, T c) { return metal::min(metal::min(a, b), c); }
template <class T, class A, class B> inline T clamp(T x, A low, B high) { return T(metal::min(metal::max(x, T(low)), T(high))); }
template <class T, if_float<T> = 0> inline T abs(T x) { return metal::fabs(x); }
template <class T, if_int<T> = 0> inline T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T, if_number<T> = 0> inline bool isnan(T x) { return x != x; }
template <class T, if_number<T> = 0> inline bool isinf(T x) { return std::isinf(float(x)); }
template <class T, if_number<T> = 0> inline bool isfinite(T x) { return std::isfinite(float(x)); }
template <class T, if_number<T> = 0> inline bool signbit(T x) { return std::signbit(float(x)); }
template <class T> inline bool isunordered(T a, T b) { return a != a || b != b; }
template <class T> inline T select(T a, T b, bool second) { return second ? b : a; }
template <class T, if_float<T> = 0> inline T fma(T a, T b, T c) { return T(std::fma(float(a), float(b), float(c))); }
template <class T> inline T mix(T a, T b, T t) { return T(a + (b - a) * t); }
template <class T, if_float<T> = 0> inline T ldexp(T x, int e) { return T(std::ldexp(float(x), e)); }
template <class T, if_float<T> = 0> inline T frexp(T x, int& e) { return T(std::frexp(float(x), &e)); }
template <class T, if_float<T> = 0> inline T modf(T x, T& whole) { whole = metal::trunc(x); return T(x - whole); }
template <class T, if_float<T> = 0> inline T sincos(T x, T& c) { c = metal::cos(x); return metal::sin(x); }
template <class T, if_float<T> = 0> inline T divide(T a, T b) { return T(a / b); }
template <class T> inline T popcount(T x) { return T(__builtin_popcountll((unsigned long long)(std::make_unsigned_t<T>(x)))); }
template <class T> inline T ctz(T x) { return x ? T(__builtin_ctzll((unsigned long long)(x))) : T(8 * sizeof(T)); }
template <class T> inline T clz(T x) {
  return x ? T(__builtin_clzll((unsigned long long)(std::make_unsigned_t<T>(x))) - (64 - 8 * int(sizeof(T)))) : T(8 * sizeof(T));
}
inline uint mulhi(uint a, uint b) { return uint(ulong(a) * b >> 32); }
inline int mulhi(int a, int b) { return int(long(a) * b >> 32); }
inline ulong mulhi(ulong a, ulong b) { return ulong((unsigned __int128)(a) * b >> 64); }

template <class V, sim::if_vector<V> = 0>
inline typename V::element dot(V a, V b) {
  typename V::element sum = 0;
  for (unsigned i = 0; i < sim::lanes_of<V>::value; i++)
    sum += a.e[i] * b.e[i];
  return sum;
}
template <class V, sim::if_vector<V> = 0> inline auto length(V v) { return metal::sqrt(metal::dot(v, v)); }
template <class V, sim::if_vector<V> = 0> inline V normalize(V v) { return v / metal::length(v); }

namespace precise {
using metal::acos, metal::acosh, metal::asin, metal::asinh, metal::atan, metal::atan2, metal::atanh, metal::ceil,
    metal::cos, metal::cosh, metal::divide, metal::exp, metal::exp10, metal::exp2, metal::fabs, metal::floor, metal::fma,
    metal::fmax, metal::fmin, metal::fmod, metal::log, metal::log10, metal::log2, metal::pow, metal::powr, metal::rint,
    metal::round, metal::rsqrt, metal::sin, metal::sincos, metal::sinh, metal::sqrt, metal::tan, metal::tanh,
    metal::trunc;
} // namespace precise
namespace fast = precise;

// ---------------------------------------------------------------- atomics: one lane runs at a time

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

template <class T> inline T atomic_load_explicit(const volatile atomic<T>* p, memory_order) { return p->value; }
template <class T, class U> inline void atomic_store_explicit(volatile atomic<T>* p, U v, memory_order) { p->value = T(v); }
template <class T>
inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* expected, T desired, memory_order, memory_order) {
  const T before = p->value;
  if (std::memcmp(&before, expected, sizeof(T)) == 0) {
    p->value = desired;
    return true;
  }
  *expected = before;
  return false;
}
#define SIM_ATOMIC(name, expression)                                                  \
  template <class T, class U>                                                         \
  inline T atomic_##name##_explicit(volatile atomic<T>* p, U u, memory_order) {       \
    const T a = p->value, b = T(u);                                                   \
    p->value = T(expression);                                                         \
    return a;                                                                         \
  }
SIM_ATOMIC(exchange, b) SIM_ATOMIC(fetch_add, a + b) SIM_ATOMIC(fetch_sub, a - b) SIM_ATOMIC(fetch_and, a & b)
SIM_ATOMIC(fetch_or, a | b) SIM_ATOMIC(fetch_xor, a ^ b)
SIM_ATOMIC(fetch_max, a < b ? b : a) SIM_ATOMIC(fetch_min, b < a ? b : a)
#undef SIM_ATOMIC
#undef SIM_UNARY
#undef SIM_BINARY

} // namespace metal
