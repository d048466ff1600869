// What -fsanitize=bounds-strict,alignment makes of the kernels' code: calls of these where an index lies outside an
// array whose length the compiler knows, and where a pointer is not aligned as its type wants. The structs are
// libubsan's.
#include "runtime.h"

namespace simt {
namespace {

struct Source {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;  // of integers: bit 0 signed, the others log2 of the bits
  char name[];          // in quotes
};
struct Index {
  Source source;
  const Type *array, *index;
};
struct Pointer {
  Source source;
  const Type* type;
  uint8_t log_alignment, kind;
};

}  // namespace
}  // namespace simt

extern "C" {
void __ubsan_handle_out_of_bounds(simt::Index* what, uintptr_t value) {
  using namespace simt;
  if (!in_kernel) return;
  const int unused = 64 - (1 << (what->index->info >> 1));
  const bool is_signed = (what->index->info & 1) != 0;
  Report finding{.kind = Kind::out_of_bounds, .now = side(*current, FASTFORMER_SIMT_CALLER, "indexed an array")};
  finding.text = "index " + (is_signed ? std::to_string(static_cast<int64_t>(value << unused) >> unused)
                                       : std::to_string(value << unused >> unused));
  finding.text += std::string(" of ") + what->array->name;
  stop(std::move(finding));
}

void __ubsan_handle_type_mismatch_v1(simt::Pointer* what, uintptr_t address) {
  using namespace simt;
  if (!in_kernel) return;
  Report finding{.kind = Kind::misaligned, .now = side(*current, FASTFORMER_SIMT_CALLER, "used")};
  finding.address = address;
  finding.bytes = 1 << what->log_alignment;
  finding.text = std::string("it must be aligned as ") + what->type->name;
  stop(std::move(finding));
}
}
