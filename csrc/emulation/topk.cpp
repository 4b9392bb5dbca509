#include "flashprune/topk.cuh"

#include "emulation/module.h"
#include "flashprune/host_ints.cuh"

namespace flashprune::emulation {
namespace {

// threads, staged, sorted: instead of the plan's, where not 0, so that small inputs take every path.
py::tuple topk(const Numbers& values, const std::vector<int>& k, const std::optional<Ints>& cu_seqlens, bool sort,
               int threads, int staged, int sorted, uint64_t seed, int blocks) {
  Stream stream(seed, blocks);
  std::vector<int32_t> starts;
  const gpu::Segments all = segments(values, int(values.ndim()), k, cu_seqlens, starts);
  gpu::TopkPlan plan = gpu::topk_plan(all, sort, stream.shared_limit());
  if (threads) plan.threads = threads;
  if (staged) plan.staged = staged;
  if (sorted) plan.sorted = sorted;
  plan.parts = !sort && all.k > plan.sorted;
  Poisoned workspace(gpu::topk_workspace(all, plan));
  auto out = poisoned_indices(all.total_k);
  gpu::topk_select(stream, all, scores(values, cu_seqlens.has_value()), plan, workspace.get(), out.mutable_data());
  return py::make_tuple(out, stream.launches());
}

py::array_t<int32_t> ints(const std::vector<int32_t>& values) {
  Stream stream(0, 1);
  py::array_t<int32_t> out(py::ssize_t(values.size()));
  gpu::host_ints(stream, values, out.mutable_data());
  return out;
}

const Binding binding([](py::module_& m) {
  m.def("topk_select", &topk, py::arg("scores"), py::arg("k"), py::arg("cu_seqlens") = py::none(),
        py::arg("sort") = true, py::arg("threads") = 0, py::arg("staged") = 0, py::arg("sorted") = 0,
        py::arg("seed") = 0, py::arg("blocks") = 4, "The picks, flat, and the number of launches.");
  m.def("host_ints", &ints, py::arg("values"));
});

}  // namespace
}  // namespace flashprune::emulation
