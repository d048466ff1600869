// Pages of 2 MiB under large results.
#pragma once

#ifdef __linux__
#include <glob.h>
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace fastformer {

#ifdef __linux__
// Whether a virtual machine's free pages, in pieces of a large page or more, go back to its host after two seconds
// (virtio 1.2, 5.5: VIRTIO_BALLOON_F_REPORTING is feature 5). To get one again takes 2.4 ms.
inline bool host_takes_free_pages() {
  constexpr int kReporting = 5;
  bool taken = false;
  glob_t found;
  if (glob("/sys/bus/virtio/drivers/virtio_balloon/virtio*/features", 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) {
      char features[kReporting + 2] = {};
      if (std::FILE* file = std::fopen(found.gl_pathv[i], "r")) {
        if (std::fgets(features, sizeof(features), file) != nullptr) taken = taken || features[kReporting] == '1';
        std::fclose(file);
      }
    }
  }
  globfree(&found);
  return taken;
}

// THP_MEM_ALLOC_ENABLE is torch's own switch, which it leaves off.
inline bool large_pages_are_wanted() {
  const char* value = std::getenv("THP_MEM_ALLOC_ENABLE");
  return value != nullptr && *value != 0 ? *value != '0' : !host_takes_free_pages();
}
#endif

// Asks for large pages under a piece of fresh memory. One beyond malloc's largest threshold, 32 MiB, comes from the
// system anew each time, a smaller one now and then, and to map it in pages of 4 KiB takes longer than most kernels do:
// 64 MiB are filled in 16 ms so, in 4.4 ms in large pages (two cores of a Zen 5). Where it had pages, nothing changes.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  static const bool kWanted = large_pages_are_wanted();
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (!kWanted || bytes < 2 * static_cast<int64_t>(kPage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastformer
