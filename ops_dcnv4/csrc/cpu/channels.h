// Loops over channels, shared by the forward and backward passes.
#pragma once

#include "cpu/simd.h"

namespace ops_dcnv4 {
namespace {

// Number of channels in a wide block of 64 bytes.
template <typename acc_t>
constexpr int wide_block = 64 / sizeof(acc_t);

// Calls body(width constant, first channel) for consecutive blocks that cover all channels.
template <typename acc_t, int widest = wide_block<acc_t>, typename Body>
OPS_DCNV4_INLINE void for_channel_blocks(int64_t channels, const Body& body) {
  constexpr int wide = wide_block<acc_t>;
  int64_t c = 0;
  if constexpr (widest > wide) {
    for (; c + widest <= channels; c += widest) body(std::integral_constant<int, widest>(), c);
  }
  for (; c + wide <= channels; c += wide) body(std::integral_constant<int, wide>(), c);
  for (; c + 4 <= channels; c += 4) body(std::integral_constant<int, 4>(), c);
  for (; c < channels; ++c) body(std::integral_constant<int, 1>(), c);
}

// Calls body with the number of channels per group, as a constant for the usual 16 (DCNv4) and 32
// (attention).
template <typename Body>
OPS_DCNV4_INLINE void with_group_channels(int64_t group_channels, const Body& body) {
  if (group_channels == 16) return body(std::integral_constant<int64_t, 16>());
  if (group_channels == 32) return body(std::integral_constant<int64_t, 32>());
  body(group_channels);
}

}  // namespace
}  // namespace ops_dcnv4
