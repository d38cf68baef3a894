#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "checks.h"
#include "cpu/workers.h"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {
namespace {

void check_levels(const Attention& a, const at::Tensor& shapes, const at::Tensor& start) {
  for (int64_t level = 0; level < a.levels; ++level) {
    const int64_t height = shapes.const_data_ptr<int64_t>()[2 * level];
    const int64_t width = shapes.const_data_ptr<int64_t>()[2 * level + 1];
    const int64_t first = start.const_data_ptr<int64_t>()[level];
    TORCH_CHECK_VALUE(is_side(height) && is_side(width) && first >= 0 && first <= a.pixels &&
                          height <= (a.pixels - first) / width,
                      "level ", level, " of spatial_shapes and level_start_index, ", height, " x ",
                      width, " from ", first, " on, does not lie within value of length ",
                      a.pixels);
  }
}

// The inputs as the kernels expect them: contiguous, with locations and normalised weights in the
// accumulator's type.
struct Inputs {
  at::Tensor value, spatial_shapes, level_start_index, locations, weights;

  Inputs(const Attention& a, const at::Tensor& value, const at::Tensor& spatial_shapes,
         const at::Tensor& level_start_index, const at::Tensor& points, const at::Tensor& weights)
      : value(dense(value)),
        spatial_shapes(dense(spatial_shapes)),
        level_start_index(dense(level_start_index)) {
    check_levels(a, this->spatial_shapes, this->level_start_index);
    const at::ScalarType dtype = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    locations = dense(points).to(dtype);
    this->weights = a.fused ? at::_softmax(locations.slice(3, a.first_weight()), -1, false)
                            : dense(weights).to(dtype);
  }

  bool is_empty() const { return value.numel() == 0 || locations.numel() == 0; }

  template <typename scalar_t>
  AttentionTensors<scalar_t> tensors() const {
    using acc_t = Accumulated<scalar_t>;
    return {spatial_shapes.const_data_ptr<int64_t>(),
            level_start_index.const_data_ptr<int64_t>(),
            value.const_data_ptr<scalar_t>(),
            locations.const_data_ptr<acc_t>(),
            weights.const_data_ptr<acc_t>()};
  }
};

at::Tensor forward(const Attention& a, const Inputs& in) {
  if (in.is_empty()) return at::zeros(a.output_shape(), in.value.options());
  at::Tensor output = at::empty(a.output_shape(), in.value.options());
  const int64_t work = std::max<int64_t>(4 * a.channels() * a.taps(), 1);
  dispatch(in.value.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    auto tensors = in.tensors<scalar_t>();
    tensors.output = output.data_ptr<scalar_t>();
    at::parallel_for(0, a.batch * a.queries, grain / work + 1, [&](int64_t begin, int64_t end) {
      const Memory<decltype(acc)> memory(a.taps(), 0);
      instruction_set().kernels(scalar).attention(a, tensors, memory.scratch, begin, end);
    });
  });
  return output;
}

struct Gradients {
  at::Tensor value, locations, weights;
};

Gradients backward(const Attention& a, const Inputs& in, const at::Tensor& grad_output) {
  check_grad_output(a.output_shape(), grad_output, in.value);
  if (in.is_empty()) {
    return {at::zeros(in.value.sizes(), in.value.options()),
            at::zeros(in.locations.sizes(), in.locations.options()),
            at::zeros(in.weights.sizes(), in.weights.options())};
  }
  const at::Tensor grad = dense(grad_output);
  const Gradients grads{at::empty(in.value.sizes(), in.value.options()),
                        at::empty(in.locations.sizes(), in.locations.options()),
                        at::empty(in.weights.sizes(), in.weights.options())};
  dispatch(in.value.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    auto tensors = in.tensors<scalar_t>();
    tensors.grad_output = grad.const_data_ptr<scalar_t>();
    tensors.grad_value = grads.value.data_ptr<scalar_t>();
    tensors.grad_locations = grads.locations.data_ptr<acc_t>();
    tensors.grad_weights = grads.weights.data_ptr<acc_t>();
    at::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
      const Memory<acc_t> memory(a.taps(), int64_t(a.pixels) * a.head_channels);
      instruction_set().kernels(scalar).attention_backward(a, tensors, memory.scratch, begin, end);
    });
  });
  return grads;
}

}  // namespace

at::Tensor ms_deform_attn_cpu(const at::Tensor& value, const at::Tensor& spatial_shapes,
                              const at::Tensor& level_start_index,
                              const at::Tensor& sampling_locations,
                              const at::Tensor& attention_weights) {
  const Attention a = make_attention(value, spatial_shapes, level_start_index, sampling_locations,
                                     attention_weights);
  return forward(a, Inputs(a, value, spatial_shapes, level_start_index, sampling_locations,
                           attention_weights));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Attention a = make_attention(value, spatial_shapes, level_start_index, sampling_locations,
                                     attention_weights);
  const Gradients grads = backward(a,
                                   Inputs(a, value, spatial_shapes, level_start_index,
                                          sampling_locations, attention_weights),
                                   grad_output);
  const at::ScalarType dtype = sampling_locations.scalar_type();
  return {grads.value, grads.locations.to(dtype), grads.weights.to(dtype)};
}

at::Tensor flash_deform_attn_cpu(const at::Tensor& value, const at::Tensor& spatial_shapes,
                                 const at::Tensor& level_start_index,
                                 const at::Tensor& sampling_loc_attn, int64_t n_points) {
  const Attention a = make_fused_attention(value, spatial_shapes, level_start_index,
                                           sampling_loc_attn, n_points);
  return forward(a, Inputs(a, value, spatial_shapes, level_start_index, sampling_loc_attn, {}));
}

std::tuple<at::Tensor, at::Tensor> flash_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_loc_attn, int64_t n_points) {
  const Attention a = make_fused_attention(value, spatial_shapes, level_start_index,
                                           sampling_loc_attn, n_points);
  const Inputs in(a, value, spatial_shapes, level_start_index, sampling_loc_attn, {});
  const Gradients grads = backward(a, in, grad_output);
  const at::Tensor grad_logits = at::_softmax_backward_data(grads.weights, in.weights, -1,
                                                            in.weights.scalar_type());
  grads.locations.slice(3, a.first_weight()).copy_(grad_logits);
  return {grads.value, grads.locations.to(sampling_loc_attn.scalar_type())};
}

}  // namespace ops_dcnv4
