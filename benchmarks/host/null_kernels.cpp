// Kernels for CPU tensors that only allocate what the op returns. Boxed, so that a version of
// PyTorch may add arguments behind those that are read here.
#include <ATen/ATen.h>
#include <torch/library.h>

using at::Tensor;
using torch::jit::Stack;

namespace {

// Takes an op's arguments off the stack.
std::vector<c10::IValue> arguments_of(const c10::OperatorHandle& op, Stack* stack) {
  return torch::jit::pop(*stack, op.schema().arguments().size());
}

// (S, H, L, E), rows of heads side by side in memory, as cuDNN writes them
Tensor heads_like(const Tensor& t) {
  return at::empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
}

Tensor numbers(const Tensor& t, at::IntArrayRef sizes) {
  return at::empty(sizes, t.options().dtype(at::kFloat));
}

Tensor product(const Tensor& a, const Tensor& b) {
  return at::empty({a.size(0), b.size(1)}, a.options());
}

void mm(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  stack->emplace_back(product(in[0].toTensor(), in[1].toTensor()));
}

void mm_dtype(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  const Tensor a = in[0].toTensor(), b = in[1].toTensor();
  stack->emplace_back(at::empty({a.size(0), b.size(1)}, a.options().dtype(in[2].toScalarType())));
}

void addmm(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  stack->emplace_back(product(in[1].toTensor(), in[2].toTensor()));
}

void first_like(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  stack->emplace_back(at::empty_like(in[0].toTensor()));
}

// Input (..., D) and (D,): no other norms are here.
void layer_norm(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  const Tensor x = in[0].toTensor();
  std::vector<int64_t> rows(x.sizes().begin(), x.sizes().end());
  rows.back() = 1;
  torch::jit::push(*stack, at::empty_like(x), numbers(x, rows), numbers(x, rows));
}

void layer_norm_backward(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  const Tensor x = in[1].toTensor(), gain = in[5].toTensor(), shift = in[6].toTensor();
  torch::jit::push(*stack, at::empty_like(x), at::empty_like(gain), at::empty_like(shift));
}

void last(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  stack->emplace_back(in.back());
}

void nothing(const c10::OperatorHandle& op, Stack* stack) { arguments_of(op, stack); }

void norms(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  c10::List<Tensor> out;
  for (const Tensor& t : in[0].toTensorVector()) out.push_back(numbers(t, {}));
  stack->emplace_back(out);
}

void flash(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  const Tensor q = in[0].toTensor();
  torch::jit::push(*stack, at::empty(q.sizes(), q.options()), numbers(q, {q.size(1), q.size(0)}),
                   numbers(q, {2}), numbers(q, {}), numbers(q, {0}));
}

void flash_backward(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  for (int n : {1, 2, 3}) {
    const Tensor t = in[n].toTensor();
    stack->emplace_back(at::empty(t.sizes(), t.options()));
  }
}

void cudnn(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  const Tensor q = in[0].toTensor();
  const Tensor none;
  torch::jit::push(*stack, heads_like(q), numbers(q, {q.size(0), q.size(1), q.size(2), 1}), none,
                   none, q.size(2), in[1].toTensor().size(2), numbers(q, {}), numbers(q, {}), none);
}

void heads_backward(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  for (int n : {1, 2, 3}) stack->emplace_back(heads_like(in[n].toTensor()));
}

void cpu_flash(const c10::OperatorHandle& op, Stack* stack) {
  auto in = arguments_of(op, stack);
  const Tensor q = in[0].toTensor();
  torch::jit::push(*stack, heads_like(q), numbers(q, {q.size(0), q.size(1), q.size(2)}));
}


}  // namespace

#define NULL_KERNEL(name, function) \
  m.impl(name, torch::CppFunction::makeFromBoxedFunction<&function>())

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  NULL_KERNEL("mm", mm);
  NULL_KERNEL("mm.out", last);
  NULL_KERNEL("mm.dtype", mm_dtype);
  NULL_KERNEL("addmm", addmm);
  NULL_KERNEL("addmm.out", last);
  NULL_KERNEL("gelu", first_like);
  NULL_KERNEL("gelu_backward", first_like);
  NULL_KERNEL("native_layer_norm", layer_norm);
  NULL_KERNEL("native_layer_norm_backward", layer_norm_backward);
  NULL_KERNEL("_flash_attention_forward", flash);
  NULL_KERNEL("_flash_attention_backward", flash_backward);
  NULL_KERNEL("_scaled_dot_product_cudnn_attention", cudnn);
  NULL_KERNEL("_scaled_dot_product_cudnn_attention_backward", heads_backward);
  NULL_KERNEL("_scaled_dot_product_flash_attention_for_cpu", cpu_flash);
  NULL_KERNEL("_scaled_dot_product_flash_attention_for_cpu_backward", heads_backward);
  NULL_KERNEL("_fused_adamw_", nothing);
  NULL_KERNEL("_foreach_norm.Scalar", norms);
}
