// Python's way in: checks every record, releases the GIL, calls. No maths here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <string>

#include "checksum.h"
#include "concrete_mask/concrete_mask.h"
#include "cpu.h"
#include "delta_merge/delta_merge.h"
#include "low_rank/low_rank.h"
#include "merge_variants/merge_variants.h"
#include "order_statistics/order_statistics.h"
#include "philox.h"
#include "pool.h"
#include "task_statistics/task_statistics.h"

namespace py = pybind11;

namespace {

[[noreturn]] void fail(const char* who, int64_t index, const std::string& what) {
  throw py::value_error(std::string(who) + "[" + std::to_string(index) + "]: " + what);
}

// The records of a one-dimensional contiguous array whose items have the layout of T.
template <class T>
T* records(py::array& array, const char* who, bool writable) {
  if (array.ndim() != 1 || array.itemsize() != py::ssize_t(sizeof(T)) || !(array.flags() & py::array::c_style))
    throw py::value_error(std::string(who) + ": expected a contiguous vector of " + std::to_string(sizeof(T)) +
                          "-byte records, got " + std::to_string(array.itemsize()) + "-byte items");
  return static_cast<T*>(writable ? array.mutable_data() : const_cast<void*>(array.data()));
}

void check_dtype(const char* who, int64_t i, int32_t dtype, int32_t last) {
  if (dtype < kF32 || dtype > last) fail(who, i, "unknown dtype code " + std::to_string(dtype));
}

// What a task or delta reads: elements of a plain dtype, or `size` formed elements of a factors record.
void check_input(const char* who, int64_t i, uint64_t x, int32_t dtype, int64_t size) {
  if (dtype != kFactors) return check_dtype(who, i, dtype, kBF16);
  if (!x) return;
  const Factors& f = *reinterpret_cast<const Factors*>(x);
  if (f.rank < 1 || f.columns < 1 || f.first < 0 || size > INT64_MAX - f.first)
    fail(who, i, "factors: rank, columns or place out of range");
  if (!f.left || !f.right) fail(who, i, "factors: one is missing");
  check_dtype(who, i, f.origin_dtype, kBF16);
}

void check_delta(const char* who, int64_t i, const Delta& d, int64_t size) {
  if (size < 0) fail(who, i, "size is negative");
  check_input(who, i, d.x, d.dtype, size);
  check_dtype(who, i, d.base_dtype, kBF16);
  if (size && !d.x) fail(who, i, "no input");
  if (d.base_kind < kBaseTensor || d.base_kind > kBaseOne) fail(who, i, "unknown base kind");
  if (size && d.base_kind == kBaseTensor && !d.is_delta && !d.base) fail(who, i, "no base");
}

void check_task(int64_t i, const Task& t) {
  check_input("task", i, t.x, t.dtype, 0);
  if (t.mask) check_dtype("task", i, t.mask_dtype, kBytes);
  if (t.weights) check_dtype("task", i, t.weights_dtype, kBF16);
  if (t.keep < kKeepAll || t.keep > kKeepRandomPerElement) fail("task", i, "unknown keep rule");
  if (t.by_probability && t.keep != kKeepRandomPerElement) fail("task", i, "has no probabilities to divide by");
  if (t.keep == kKeepRandomPerElement && !t.probability) fail("task", i, "no probabilities");
  if (t.low > kAbsMask || t.high > kAbsMask) fail("task", i, "a threshold is negative");
}

void check_rule(int64_t i, const Rule& r) {
  if (r.base_kind < kBaseTensor || r.base_kind > kBaseOne) fail("rule", i, "unknown base kind");
  if (r.elect < kElectNone || r.elect > kElectGiven) fail("rule", i, "unknown election");
  if (r.aggregate < kSum || r.aggregate > kMedian) fail("rule", i, "unknown aggregate");
  if (r.divide < kDivideConstant || r.divide > kDivideAgreeingCount) fail("rule", i, "unknown divisor");
  if (r.elect == kElectNone && (r.divide != kDivideConstant || r.aggregate == kMax))
    fail("rule", i, "needs an elected sign");
  if (r.elect != kElectNone && r.aggregate > kMax) fail("rule", i, "takes no elected sign");
}

void check_piece(int64_t i, Mode mode, const Piece& p, const Task* tasks, int64_t num_tasks, const Rule* rules,
                 int64_t num_rules) {
  if (p.size < 0 || p.start < 0) fail("piece", i, "size or start is negative");
  if (p.tasks < 0 || p.first_task < 0 || p.tasks > num_tasks - p.first_task) fail("piece", i, "tasks out of range");
  if (p.rule < 0 || p.rule >= num_rules) fail("piece", i, "rule out of range");
  check_dtype("piece", i, p.base_dtype, kBF16);
  check_dtype("piece", i, p.out_dtype, kBF16);
  if (p.sign) check_dtype("piece", i, p.sign_dtype, kBF16);
  const Rule& rule = rules[p.rule];
  if (rule.aggregate == kMedian && p.tasks < 1) fail("piece", i, "a median needs a task");
  if (!p.size) return;
  if (rule.base_kind == kBaseTensor && !p.base) fail("piece", i, "no base");
  if (rule.elect == kElectGiven && !p.sign) fail("piece", i, "no given sign");
  if (mode == kMerge && !p.out) fail("piece", i, "no output");
  if (mode == kKeptNorm && !p.partials) fail("piece", i, "no place for partial sums");
  for (int64_t t = p.first_task; t < p.first_task + p.tasks; ++t)
    if (!tasks[t].x) fail("piece", i, "a task has no input");
}

void delta_merge_checked(int mode, py::array pieces, py::array tasks, py::array rules, int threads) {
  Piece* p = records<Piece>(pieces, "pieces", true);
  const Task* t = records<Task>(tasks, "tasks", false);
  const Rule* r = records<Rule>(rules, "rules", false);
  if (mode < kMerge || mode > kSignTotal) throw py::value_error("unknown mode");
  for (int64_t i = 0; i < tasks.size(); ++i) check_task(i, t[i]);
  for (int64_t i = 0; i < rules.size(); ++i) check_rule(i, r[i]);
  for (int64_t i = 0; i < pieces.size(); ++i) check_piece(i, Mode(mode), p[i], t, tasks.size(), r, rules.size());
  const int64_t n = pieces.size();
  py::gil_scoped_release release;
  delta_merge(Mode(mode), p, n, t, r, threads);
}

void check_group(int64_t i, const VariantGroup& g, const Task* terms, int64_t num_terms, int64_t num_variants) {
  if (g.size < 0 || g.start < 0) fail("group", i, "size or start is negative");
  if (g.terms < 0 || g.first_term < 0 || g.terms > num_terms - g.first_term) fail("group", i, "terms out of range");
  if (g.variants < 0 || g.first_variant < 0 || g.variants > num_variants - g.first_variant)
    fail("group", i, "variants out of range");
  check_dtype("group", i, g.base_dtype, kBF16);
  if (g.base_kind < kBaseTensor || g.base_kind > kBaseOne) fail("group", i, "unknown base kind");
  if (g.size && g.base_kind == kBaseTensor && !g.base) fail("group", i, "no base");
  for (int64_t t = g.first_term; t < g.first_term + g.terms; ++t) {
    if (g.size && !terms[t].x) fail("term", t, "has no input");
    check_dtype("term", t, terms[t].dtype, kBF16);
    if (terms[t].weights) fail("term", t, "has element-wise weights, which only delta_merge takes");
  }
}

void check_variant(int64_t i, const VariantGroup& g, const Variant& v, const Use* uses, int64_t num_uses,
                   const Rule* rules, int64_t num_rules) {
  if (v.uses < 0 || v.first_use < 0 || v.uses > num_uses - v.first_use) fail("variant", i, "uses out of range");
  if (v.rule < 0 || v.rule >= num_rules) fail("variant", i, "rule out of range");
  check_dtype("variant", i, v.out_dtype, kBF16);
  if (g.size && !v.out) fail("variant", i, "no output");
  const Rule& rule = rules[v.rule];
  if (rule.base_kind != g.base_kind) fail("variant", i, "its rule has another base kind than its group");
  if (rule.elect == kElectGiven) fail("variant", i, "has a given sign, which only delta_merge takes");
  if (rule.aggregate == kMedian && v.uses < 1) fail("variant", i, "a median needs a term");
  for (int64_t u = v.first_use; u < v.first_use + v.uses; ++u)
    if (uses[u].term < 0 || uses[u].term >= g.terms) fail("use", u, "term out of range");
}

void merge_variants_checked(py::array groups, py::array terms, py::array variants, py::array uses, py::array rules,
                            int threads) {
  const VariantGroup* g = records<VariantGroup>(groups, "groups", false);
  const Task* t = records<Task>(terms, "terms", false);
  Variant* v = records<Variant>(variants, "variants", true);
  const Use* u = records<Use>(uses, "uses", false);
  const Rule* r = records<Rule>(rules, "rules", false);
  for (int64_t i = 0; i < terms.size(); ++i) check_task(i, t[i]);
  for (int64_t i = 0; i < rules.size(); ++i) check_rule(i, r[i]);
  for (int64_t i = 0; i < groups.size(); ++i) {
    check_group(i, g[i], t, terms.size(), variants.size());
    for (int64_t k = g[i].first_variant; k < g[i].first_variant + g[i].variants; ++k)
      check_variant(k, g[i], v[k], u, uses.size(), r, rules.size());
  }
  const int64_t n = groups.size();
  py::gil_scoped_release release;
  merge_variants(g, n, t, v, u, r, threads);
}

void select_checked(py::array tasks, py::array queries, int threads) {
  const SelectTask* t = records<SelectTask>(tasks, "tasks", false);
  SelectQuery* q = records<SelectQuery>(queries, "queries", true);
  for (int64_t i = 0; i < tasks.size(); ++i) {
    check_delta("task", i, t[i].delta, t[i].size);
    if (t[i].queries < 0 || t[i].first_query < 0 || t[i].queries > queries.size() - t[i].first_query)
      fail("task", i, "queries out of range");
    if (i && t[i].group == t[i - 1].group && t[i].size != t[i - 1].size) fail("task", i, "sizes differ in a group");
    for (int64_t k = t[i].first_query; k < t[i].first_query + t[i].queries; ++k)
      if (q[k].count < 1 || q[k].count > t[i].size) fail("query", k, "count is outside 1..size");
  }
  const int64_t n = tasks.size();
  py::gil_scoped_release release;
  select_magnitudes(t, n, q, threads);
}

const Delta& one_delta(py::array& delta, int64_t size) {
  const Delta* d = records<Delta>(delta, "delta", false);
  if (delta.size() != 1) throw py::value_error("delta: expected one record");
  check_delta("delta", 0, *d, size);
  return *d;
}

uint64_t* bins_of(py::array& bins, py::ssize_t count) {
  uint64_t* p = records<uint64_t>(bins, "bins", true);
  if (bins.size() != count) throw py::value_error("bins: expected " + std::to_string(count) + " of them");
  return p;
}

void histogram_checked(py::array delta, int64_t size, py::array bins, int prefix, int threads) {
  const Delta& d = one_delta(delta, size);
  uint64_t* b = bins_of(bins, prefix < 0 ? 65536 : 32768);
  py::gil_scoped_release release;
  if (prefix < 0) magnitude_histogram(d, size, b, threads);
  else magnitude_histogram_low(d, size, uint32_t(prefix), b, threads);
}

void ranked_checked(py::array delta, int64_t begin_row, int64_t rows, int64_t columns, double low, double high,
                    py::array_t<float, py::array::c_style> out, int threads) {
  if (begin_row < 0 || rows < 0 || columns < 1 || columns > INT32_MAX || begin_row > INT64_MAX / columns - rows)
    throw py::value_error("rows: out of range");
  const Delta& d = one_delta(delta, rows);
  if (out.size() != rows * columns) throw py::value_error("out: expected rows * columns items");
  float* p = out.mutable_data();
  py::gil_scoped_release release;
  ranked_probability(d, begin_row, rows, columns, low, high, p, threads);
}

py::dict statistics_checked(py::array deltas, int64_t size, int threads) {
  const Delta* d = records<Delta>(deltas, "deltas", false);
  const int tasks = int(deltas.size()), pairs = tasks * (tasks - 1) / 2;
  for (int i = 0; i < tasks; ++i) check_delta("deltas", i, d[i], size);
  py::array_t<double> sums(2 * tasks + tasks * (tasks + 1) / 2);
  py::array_t<int64_t> nonfinite(tasks), nonzero(tasks), conflicts(pairs), any(1);
  py::array_t<uint32_t> largest(tasks);
  const StatisticsCounts counts{nonfinite.mutable_data(), nonzero.mutable_data(), conflicts.mutable_data(),
                                any.mutable_data(), largest.mutable_data()};
  double* s = sums.mutable_data();
  {
    py::gil_scoped_release release;
    task_statistics(d, tasks, size, s, counts, threads);
  }
  py::dict result;
  result["sums"] = sums, result["nonfinite"] = nonfinite, result["nonzero"] = nonzero;
  result["conflicts"] = conflicts, result["any_conflict"] = any, result["largest"] = largest;
  return result;
}

void check_mask_tensor(int64_t i, MaskMode mode, const MaskTensor& t, const MaskTask* tasks, int64_t num_tasks,
                       int64_t num_sums) {
  if (t.size < 0) fail("tensor", i, "size is negative");
  if (t.tasks < 0 || t.first_task < 0 || t.tasks > num_tasks - t.first_task) fail("tensor", i, "tasks out of range");
  for (int32_t dtype : {t.base_dtype, t.out_dtype, t.g_dtype}) check_dtype("tensor", i, dtype, kBF16);
  const int sums = mode == kMaskMean ? 1 : mode == kMaskReduce ? t.tasks : 0;
  if (t.first_sum < 0 || sums > num_sums - t.first_sum) fail("tensor", i, "sums out of range");
  if (!t.size) return;
  for (int64_t k = t.first_task; k < t.first_task + t.tasks; ++k)
    if (!tasks[k].x) fail("tensor", i, "a task has no input");
  if ((mode == kMaskSample || mode == kMaskMerge) && !t.out) fail("tensor", i, "no output");
  if ((mode == kMaskReduce || mode == kMaskUpdate) && !t.g) fail("tensor", i, "no gradient to start from");
  if (mode == kMaskUpdate && (!t.logits || (!t.gradient && (!t.exp_avg || !t.exp_avg_sq))))
    fail("tensor", i, "no place for the update");
}

void concrete_mask_checked(int mode, py::array tensors, py::array tasks, py::array settings, py::array sums,
                           int threads) {
  const MaskTensor* t = records<MaskTensor>(tensors, "tensors", false);
  const MaskTask* k = records<MaskTask>(tasks, "tasks", false);
  const MaskSettings* s = records<MaskSettings>(settings, "settings", false);
  double* out = records<double>(sums, "sums", true);
  if (mode < kMaskSample || mode > kMaskUpdate) throw py::value_error("unknown mode");
  if (settings.size() != 1 || !(s->temperature > 0)) throw py::value_error("settings: expected a positive temperature");
  for (int64_t i = 0; i < tasks.size(); ++i) check_dtype("task", i, k[i].dtype, kBF16);
  for (int64_t i = 0; i < tensors.size(); ++i)
    check_mask_tensor(i, MaskMode(mode), t[i], k, tasks.size(), sums.size());
  const int64_t n = tensors.size();
  py::gil_scoped_release release;
  concrete_mask(MaskMode(mode), t, n, k, *s, out, threads);
}

void copy_bytes(uint64_t to, uint64_t from, int64_t bytes, int threads) {
  constexpr int64_t kGrain = 4 << 20;
  if (bytes < 0 || (bytes && (!to || !from))) throw py::value_error("copy_bytes: no address or a negative size");
  py::gil_scoped_release release;
  parallel_for((bytes + kGrain - 1) / kGrain, threads, [=](int64_t i, int) {
    const int64_t at = i * kGrain;
    std::memcpy((char*)to + at, (const char*)from + at, size_t(std::min(kGrain, bytes - at)));
  });
}

uint64_t checksum_of(uint64_t from, int64_t bytes, int threads) {
  if (bytes < 0 || (bytes && !from)) throw py::value_error("checksum: no address or a negative size");
  py::gil_scoped_release release;
  return checksum((const void*)from, bytes, threads);
}

void form_checked(py::array factors, int64_t size, py::array_t<float, py::array::c_style> out, int threads) {
  const Factors* f = records<Factors>(factors, "factors", false);
  if (factors.size() != 1 || size < 0 || out.size() != size) throw py::value_error("factors: expected one record");
  check_input("factors", 0, reinterpret_cast<uint64_t>(f), kFactors, size);
  float* p = out.mutable_data();
  py::gil_scoped_release release;
  form_low_rank(*f, size, p, threads);
}

py::array_t<uint32_t> philox(uint64_t key, uint64_t first, int count) {
  if (first % 4 || count < 0 || count > (1 << 30))
    throw py::value_error("philox_words: first must be a multiple of 4, count positive");
  py::array_t<uint32_t> out((count + 3) / 4 * 4);
  uint32_t* to = out.mutable_data();
  for (int64_t at = 0; at < out.size(); at += 64) {
    uint32_t words[64];
    philox_words(words, key, first + uint64_t(at), 64);
    std::copy_n(words, std::min<int64_t>(64, out.size() - at), to + at);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU operations of peta_fast: raw pointers, sizes and dtype codes in, nothing kept.";
  m.def("delta_merge", delta_merge_checked);
  m.def("merge_variants", merge_variants_checked);
  m.def("select_magnitudes", select_checked);
  m.def("magnitude_histogram", histogram_checked);
  m.def("ranked_probability", ranked_checked);
  m.def("task_statistics", statistics_checked);
  m.def("concrete_mask", concrete_mask_checked);
  m.def("tree_sum", [](py::array_t<double, py::array::c_style> values) {
    return tree_sum(values.mutable_data(), values.size(), 1);
  });
  m.def("form_factors", form_checked);
  m.def("copy_bytes", copy_bytes);
  m.def("checksum", checksum_of);
  m.def("philox_words", philox);
  m.def("default_threads", default_threads);
  m.def("simd", [] { return std::string(simd_name(simd_level())); });
  m.def("best_simd", [] { return std::string(simd_name(best_simd_level())); });
  m.def("set_simd", [](const std::string& name) { return set_simd_level(name.c_str()); });
  m.attr("RECORD_BYTES") = py::dict(py::arg("piece") = sizeof(Piece), py::arg("task") = sizeof(Task),
                                    py::arg("rule") = sizeof(Rule), py::arg("delta") = sizeof(Delta),
                                    py::arg("group") = sizeof(VariantGroup), py::arg("variant") = sizeof(Variant),
                                    py::arg("use") = sizeof(Use), py::arg("select_task") = sizeof(SelectTask),
                                    py::arg("select_query") = sizeof(SelectQuery), py::arg("factors") = sizeof(Factors),
                                    py::arg("mask_tensor") = sizeof(MaskTensor),
                                    py::arg("mask_task") = sizeof(MaskTask),
                                    py::arg("mask_settings") = sizeof(MaskSettings));
}
