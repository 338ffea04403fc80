// Metal's SIMD-group functions over 32 lanes: each publishes its value and reads the others'.
//
// A value of a lane that does not take part is undefined in Metal. Here it is zero for a lane of the SIMD group that
// is inactive (what c10/metal/reduction_utils.h reports of Apple's chips) and all bits set beyond the 32.
#pragma once

namespace metal {

enum sim_operation { kSum = 1, kProduct, kMax, kMin, kAnd, kOr, kXor, kBallot, kBroadcast, kFirst, kShuffle, kFill, kPrefix, kSync, kMatrix };

struct simd_vote {
  ulong mask;
  explicit operator ulong() const { return mask; }
  bool any() const { return mask != 0; }
};

#define SIM_SITE unsigned line = __builtin_LINE()

template <class T, class F>
inline T sim_reduce(T value, F f, unsigned operation, unsigned line) {
  const auto all = sim::publish(value, operation, line);
  char* result = sim::group.results[sim::group.lane->index / sim::kSimdWidth];
  if (all.lane == all.first()) { // once for all lanes
    for (unsigned i = all.lane + 1; i < sim::kSimdWidth; i++)
      if (all.has(i))
        value = T(f(value, all[i]));
    std::memcpy(result, &value, sizeof(T));
  }
  std::memcpy(&value, result, sizeof(T));
  return value;
}

template <class T> inline T simd_sum(T v, SIM_SITE) { return sim_reduce(v, [](T a, T b) { return a + b; }, kSum, line); }
template <class T> inline T simd_product(T v, SIM_SITE) { return sim_reduce(v, [](T a, T b) { return a * b; }, kProduct, line); }
template <class T> inline T simd_max(T v, SIM_SITE) { return sim_reduce(v, [](T a, T b) { return metal::max(a, b); }, kMax, line); }
template <class T> inline T simd_min(T v, SIM_SITE) { return sim_reduce(v, [](T a, T b) { return metal::min(a, b); }, kMin, line); }
template <class T> inline T simd_and(T v, SIM_SITE) { return sim_reduce(v, [](T a, T b) { return a & b; }, kAnd, line); }
template <class T> inline T simd_or(T v, SIM_SITE) { return sim_reduce(v, [](T a, T b) { return a | b; }, kOr, line); }
template <class T> inline T simd_xor(T v, SIM_SITE) { return sim_reduce(v, [](T a, T b) { return a ^ b; }, kXor, line); }

inline simd_vote simd_ballot(bool v, SIM_SITE) {
  const auto all = sim::publish(v, kBallot, line);
  ulong mask = 0;
  for (unsigned i = 0; i < sim::kSimdWidth; i++)
    mask |= ulong(all.has(i) && all[i]) << i;
  return {mask};
}
inline bool simd_any(bool v, SIM_SITE) { return simd_ballot(v, line).mask != 0; }
inline bool simd_all(bool v, SIM_SITE) { return simd_ballot(!v, line).mask == 0; }
inline simd_vote simd_active_threads_mask(SIM_SITE) { return simd_ballot(true, line); }
inline bool simd_is_first(SIM_SITE) {
  const auto all = sim::publish(true, kFirst, line);
  return all.lane == all.first();
}

template <class T>
inline T sim_read(const sim::Published<T>& all, int lane) {
  T value;
  std::memset(&value, lane >= 0 && lane < int(sim::kSimdWidth) ? 0 : 0xff, sizeof value);
  return lane >= 0 && all.has(unsigned(lane)) ? all[unsigned(lane)] : value;
}
template <class T> inline T simd_broadcast(T v, ushort lane, SIM_SITE) { return sim_read(sim::publish(v, kBroadcast, line), lane); }
template <class T> inline T simd_broadcast_first(T v, SIM_SITE) {
  const auto all = sim::publish(v, kBroadcast, line);
  return all[all.first()];
}
template <class T> inline T simd_shuffle(T v, ushort lane, SIM_SITE) { return sim_read(sim::publish(v, kShuffle, line), lane); }
template <class T> inline T simd_shuffle_xor(T v, ushort mask, SIM_SITE) {
  const auto all = sim::publish(v, kShuffle, line);
  return sim_read(all, int(all.lane ^ mask));
}
template <class T> inline T simd_shuffle_down(T v, ushort by, SIM_SITE) {
  const auto all = sim::publish(v, kShuffle, line);
  return sim_read(all, int(all.lane) + by);
}
template <class T> inline T simd_shuffle_up(T v, ushort by, SIM_SITE) {
  const auto all = sim::publish(v, kShuffle, line);
  return sim_read(all, int(all.lane) - by);
}
// Beyond the end come the filling value's lanes, from the other end. Value and filling travel together: what one
// operation published is gone at the next.
template <class T> struct sim_filled { T value, fill; };
template <class T> inline T simd_shuffle_and_fill_down(T v, T fill, ushort by, SIM_SITE) {
  const auto all = sim::publish(sim_filled<T>{v, fill}, kFill, line);
  const int lane = int(all.lane) + by;
  return lane < int(sim::kSimdWidth) ? sim_read(all, lane).value : sim_read(all, lane - int(sim::kSimdWidth)).fill;
}
template <class T> inline T simd_shuffle_and_fill_up(T v, T fill, ushort by, SIM_SITE) {
  const auto all = sim::publish(sim_filled<T>{v, fill}, kFill, line);
  const int lane = int(all.lane) - by;
  return lane >= 0 ? sim_read(all, lane).value : sim_read(all, lane + int(sim::kSimdWidth)).fill;
}

template <class T, class F>
inline T sim_prefix(T value, T start, F f, bool inclusive, unsigned line) {
  const auto all = sim::publish(value, kPrefix, line);
  T result = start;
  for (unsigned i = 0; i < all.lane + (inclusive ? 1 : 0); i++)
    if (all.has(i))
      result = T(f(result, all[i]));
  return result;
}
template <class T> inline T simd_prefix_inclusive_sum(T v, SIM_SITE) { return sim_prefix(v, T(0), [](T a, T b) { return a + b; }, true, line); }
template <class T> inline T simd_prefix_exclusive_sum(T v, SIM_SITE) { return sim_prefix(v, T(0), [](T a, T b) { return a + b; }, false, line); }
template <class T> inline T simd_prefix_inclusive_product(T v, SIM_SITE) { return sim_prefix(v, T(1), [](T a, T b) { return a * b; }, true, line); }
template <class T> inline T simd_prefix_exclusive_product(T v, SIM_SITE) { return sim_prefix(v, T(1), [](T a, T b) { return a * b; }, false, line); }

inline void simdgroup_barrier(mem_flags, SIM_SITE) { sim::publish(true, kSync, line); }
#undef SIM_SITE

} // namespace metal
