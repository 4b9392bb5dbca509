// The selection operators of torch.ops.flashprune. Implementations register themselves: csrc/cpu, csrc/cuda. The two of
// attention are in python/flashprune/attention.py: they are made of torch's own products and need no library.
//
// Shapes are those of the public Python functions: features [N, D], [B, N, D], or packed [T, D] with cu_seqlens int32
// [B + 1]; k has one entry, or one a segment when packed; the result is int64 [k], [B, k] or [sum k]. block is the
// engine's block size: 0 lets it choose, any value gives the same picks.
#include <torch/csrc/stable/library.h>

#ifndef FLASHPRUNE_LIBRARY  // another name for the emulated kernels
#define FLASHPRUNE_LIBRARY flashprune
#endif

STABLE_TORCH_LIBRARY(FLASHPRUNE_LIBRARY, m) {
  m.def("topk_select(Tensor scores, int[] k, Tensor? cu_seqlens, bool sort) -> Tensor");
  m.def(
      "mmr_select(Tensor features, Tensor importance, int[] k, Tensor? cu_seqlens, float lam, int per_round, "
      "bool sort, int block=0) -> Tensor");
  m.def(
      "mis_select(Tensor features, Tensor importance, int[] k, Tensor? positions, Tensor? cu_seqlens, float alpha, "
      "float threshold, str similarity, str proximity, int radius, float sigma, int temporal_radius, int[] pivots, "
      "bool pivots_suppress, bool sort, int block=0) -> Tensor");
  m.def("maxmin_select(Tensor features, int[] k, Tensor? cu_seqlens, bool sort, int block=0) -> Tensor");
  m.def("dpp_select(Tensor features, Tensor relevance, int[] k, Tensor? cu_seqlens, bool sort, int block=0) -> Tensor");
  // One video, features [N, D], frame after frame; keep is the share that a frame keeps on average.
  m.def("evs_select(Tensor features, int frames, int k, bool sort) -> Tensor");
  m.def("vidcom2_select(Tensor features, int frames, float keep, int k, bool sort) -> Tensor");
  // CUDA alone: python/flashprune/workspaces.py.
  m.def("use_workspace(Tensor buffer) -> ()");
  m.def("workspace_bytes(Tensor like) -> int");
}
