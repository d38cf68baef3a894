#include <algorithm>

#include "attention.h"
#include "cpu/ms_deform_attn_inputs.h"
#include "cpu/workers.h"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {

Tensor ms_deform_attn_cpu(const AttentionInputs& inputs) {
  const Attention a = make_attention(inputs);
  const DenseInputs in(a, inputs);
  if (in.is_empty()) return zero_tensor(a.output_shape(), in.value);
  Tensor output = empty_tensor(a.output_shape(), in.value);
  const int64_t work = std::max<int64_t>(4 * a.channels() * a.taps(), 1);
  dispatch(in.value.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    auto tensors = in.tensors<scalar_t>();
    tensors.output = output.mutable_data_ptr<scalar_t>();
    const auto& kernels = instruction_set().kernels(scalar);
    torch::stable::parallel_for(
        0, a.batch * a.queries, grain / work + 1, [&](int64_t begin, int64_t end) {
          const ScratchMemory<decltype(acc)> memory(a.taps(), 0);
          kernels.ms_deform_attn_forward(a, tensors, memory.scratch, begin, end);
        });
  });
  return output;
}

}  // namespace ops_dcnv4
