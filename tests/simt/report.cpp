// Findings: collected while a kernel runs, put into words afterwards.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

#include "asynchronous.h"
#include "runtime.h"
#include "schedule.h"

namespace simt {

std::vector<Report> reports;
std::vector<Finding> findings;

namespace {

constexpr size_t kMost = 8;

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::race:
      return "race";
    case Kind::proxy:
      return "proxy";
    case Kind::out_of_bounds:
      return "out of bounds";
    case Kind::read_only:
      return "written where only reads are allowed";
    case Kind::misaligned:
      return "misaligned";
    case Kind::uninitialised:
      return "uninitialised";
    case Kind::copy_under_way:
      return "copy under way";
    case Kind::not_running:
      return "block not running";
    case Kind::deadlock:
      return "deadlock";
    case Kind::divergence:
      return "divergence";
    case Kind::bad_call:
      return "bad call";
    case Kind::endless:
      return "endless";
    case Kind::trap:
      return "trap";
  }
  return "";
}

struct Place {
  std::string function;  // the outermost, demangled
  std::vector<std::string> lines;
};

// Where code addresses come from, by binutils' addr2line, which knows what was inlined where.
std::map<Code, Place> places_of(const std::set<Code>& codes) {
  std::map<Code, Place> places;
  Dl_info library;
  if (codes.empty() || dladdr(&__ehdr_start, &library) == 0) return places;
  std::string command = std::string("addr2line -a -i -f -C -e '") + library.dli_fname + "'";
  char address[32];
  for (Code code : codes) {
    std::snprintf(address, sizeof(address), " 0x%x", code);
    command += address;
  }
  std::FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return places;
  std::string line, function;
  Place* place = nullptr;
  bool is_function = true;
  for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) {
    if (c != '\n') {
      line += static_cast<char>(c);
      continue;
    }
    if (line.rfind("0x", 0) == 0) {
      place = &places[static_cast<Code>(std::stoul(line, nullptr, 16))];
      is_function = true;
    } else if (is_function) {
      function = line;
      is_function = false;
    } else if (place != nullptr) {
      is_function = true;
      place->function = function;
      std::string where = line.substr(0, line.find(" ("));
      where = where.substr(where.rfind('/') + 1);
      const bool ours =
          where.rfind("simt.h:", 0) == 0 || where.rfind("simt_ptx.h:", 0) == 0 || where.rfind("simt_hopper.h:", 0) == 0;
      if (!ours && where != "??:?" && where != "??:0") place->lines.push_back(where);
    }
    line.clear();
  }
  pclose(pipe);
  return places;
}

// A name as the source has it.
std::string plain(std::string name) {
  for (const std::string noise : {"void ", "fastformer::cuda::", "(anonymous namespace)::"}) {
    for (size_t at = name.find(noise); at != std::string::npos; at = name.find(noise)) name.erase(at, noise.size());
  }
  return name;
}

std::string address_of(Code code) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%x", code);
  return text;
}

std::string name_of_kernel(Code code, const Place& place) {
  return place.function.empty() ? "the kernel at " + address_of(code) : plain(place.function);
}

// Of a place that has no lines (there is no addr2line): its address in the module.
std::string joined_lines(const std::vector<std::string>& lines, Code code) {
  std::string text;
  if (lines.empty()) text = " at " + address_of(code - 1);
  for (const std::string& line : lines) text += (text.empty() ? " at " : ", from ") + line;
  return text;
}

std::string who(const Side& side) {
  return "thread " + std::to_string(side.thread) + " of block " + std::to_string(side.block) + " " + side.did;
}

}  // namespace

Side side(const Thread& thread, Code code, const char* did) {
  const int worker = worker_of(thread.index, thread.time);
  return {state.block + rank_of(worker), number_of(worker), code, did};
}

void report(Report finding) {
  for (const Report& other : reports) {
    if (other.kind == finding.kind && other.now.code == finding.now.code && other.before.code == finding.before.code) {
      return;
    }
  }
  if (reports.size() < kMost || state.aborted) reports.push_back(std::move(finding));
}

void bad_call(const Thread& thread, Code code, const char* did, std::string text) {
  Report finding{.kind = Kind::bad_call, .now = side(thread, code, did)};
  finding.text = std::move(text);
  stop(std::move(finding));
}

std::map<Code, std::string> names_of(const std::set<Code>& kernels) {
  std::map<Code, Place> places = places_of(kernels);
  std::map<Code, std::string> names;
  for (Code code : kernels) names[code] = name_of_kernel(code, places[code]);
  return names;
}

std::vector<Finding> explain(const std::vector<Report>& reports) {
  std::vector<Finding> all;
  if (reports.empty()) return all;
  const Code kernel = code_of(state.launch.kernel);
  // A call's return address lies behind it.
  std::set<Code> codes{kernel};
  for (const Report& report : reports) {
    codes.insert(report.now.code - 1);
    codes.insert(report.before.code - 1);
    for (const auto& [text, code] : report.notes) codes.insert(code - 1);
  }
  codes.erase(static_cast<Code>(-1));
  std::map<Code, Place> places = places_of(codes);
  const std::string name = name_of_kernel(kernel, places[kernel]);
  for (const Report& report : reports) {
    const auto lines = places[report.now.code - 1].lines, other_lines = places[report.before.code - 1].lines;
    if (report.unless_same_line && !lines.empty() && lines == other_lines) continue;
    Finding finding{.kind = name_of(report.kind),
                    .kernel = name,
                    .block = report.now.block,
                    .thread = report.now.thread,
                    .other_block = report.before.block,
                    .other_thread = report.before.thread,
                    .lines = lines,
                    .other_lines = other_lines};
    std::string& text = finding.text;
    text = finding.kind + ": " + who(report.now);
    if (report.bytes > 0) {
      finding.address = name_of_address(report.address);
      text += " " + std::to_string(report.bytes) + " bytes at " + finding.address;
    }
    text += joined_lines(lines, report.now.code);
    if (report.before.thread >= 0) {
      text += "; " + who(report.before);
      if (report.bytes > 0) text += " it";
      text += joined_lines(other_lines, report.before.code);
      if (report.kind == Kind::race) {
        const bool together = report.now.block / state.cluster == report.before.block / state.cluster;
        text += together ? ", and nothing orders the two" : ", and blocks have no order";
      }
      if (report.kind == Kind::copy_under_way) text += ", and has not waited for it";
    }
    if (!report.text.empty()) text += ": " + report.text;
    for (const auto& [note, code] : report.notes) text += "\n    " + note + joined_lines(places[code - 1].lines, code);
    all.push_back(std::move(finding));
  }
  return all;
}

std::string describe(const std::vector<Finding>& findings) {
  std::string text = "simt: " + findings.front().kernel + ":";
  for (const Finding& finding : findings) text += "\n  " + finding.text;
  return text;
}

}  // namespace simt
