// Loops over channels, shared by the forward and backward passes.
#pragma once

#include "cpu/simd.h"

namespace ops_dcnv4 {
namespace {

// Number of channels that are processed at a time: two registers.
template <typename acc_t>
constexpr int widest_block = 2 * native_width<acc_t>;

// Calls body(width constant, first channel) for consecutive blocks that cover all channels. Widths
// are widest, half of it and so on down to 4, and 1.
template <typename acc_t, int width = widest_block<acc_t>, typename Body>
OPS_DCNV4_INLINE void for_channel_blocks(int64_t channels, const Body& body, int64_t c = 0) {
  for (; c + width <= channels; c += width) body(std::integral_constant<int, width>(), c);
  if constexpr (width > 1) {
    for_channel_blocks<acc_t, (width > 4 ? width / 2 : 1)>(channels, body, c);
  }
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
