// fuzz_plan N SEED FILE…: N damaged copies of .sodfast files through the C API. Each gives an error code or a result;
// anything else ends the process. Most get a right checksum, so that the damage reaches what lies behind it.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "sodfast.h"

namespace {

using Bytes = std::vector<unsigned char>;
constexpr size_t header = 120, size_at = 16, crc_at = 24;

uint32_t crc32(const unsigned char* p, size_t n) {
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < n; ++i) {
    crc ^= p[i];
    for (int k = 0; k < 8; ++k) crc = crc & 1 ? 0xedb88320u ^ (crc >> 1) : crc >> 1;
  }
  return ~crc;
}

void mutate(Bytes& data, std::mt19937_64& random, size_t weights) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % (n == 0 ? 1 : n)); };
  const int changes = 1 + static_cast<int>(below(4));
  for (int i = 0; i < changes && !data.empty(); ++i) {
    // What describes the network is small beside its weights, and more rewarding.
    const size_t at = below(below(10) == 0 ? data.size() : std::min(weights, data.size()));
    switch (below(7)) {
      case 0:
        data[at] ^= static_cast<unsigned char>(1u << below(8));
        break;
      case 1:
        data[at] = static_cast<unsigned char>(random());
        break;
      case 2:
        data.resize(at);
        break;
      case 3:
        data.insert(data.begin() + static_cast<long>(at), 4 * (1 + below(8)), 0);
        break;
      case 4:
        data.erase(data.begin() + static_cast<long>(at),
                   data.begin() + static_cast<long>(std::min(at + 4, data.size())));
        break;
      default: {  // a whole word
        static const uint32_t words[] = {0,   1,   2,    3,    4,          5,          8,         16,
                                         255, 256, 4095, 4096, 0x7fffffff, 0x80000000, 0xffffffff};
        const size_t word = at / 4 * 4;
        if (word + 4 > data.size()) break;
        uint32_t value;
        std::memcpy(&value, &data[word], 4);
        value = below(2) ? words[below(std::size(words))] : value + static_cast<uint32_t>(below(5)) - 2;
        std::memcpy(&data[word], &value, 4);
      }
    }
  }
  if (below(10) == 0 || data.size() < header) return;
  const uint64_t size = data.size();
  std::memcpy(&data[size_at], &size, 8);
  const uint32_t crc = crc32(data.data() + header, data.size() - header);
  std::memcpy(&data[crc_at], &crc, 4);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: fuzz_plan N SEED FILE...\n"), 2;
  const long cases = std::atol(argv[1]);
  std::mt19937_64 random(static_cast<uint64_t>(std::atol(argv[2])));
  std::vector<Bytes> files;
  for (int i = 3; i < argc; ++i) {
    std::ifstream in(argv[i], std::ios::binary);
    files.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  long count[6] = {};
  double slowest = 0;
  for (long i = 0; i < cases; ++i) {
    Bytes data = files[static_cast<size_t>(i) % files.size()];
    uint32_t parts[4] = {};  // tensors, steps, words, floats
    std::memcpy(parts, &data[crc_at + 4], sizeof(parts));
    mutate(data, random, header + 8 * parts[0] + 4 * parts[2]);
    const auto start = std::chrono::steady_clock::now();
    sodfast_network* network = nullptr;
    Bytes exact(data);  // a block of exactly this size: AddressSanitizer sees every stray access
    sodfast_status status = sodfast_open_memory(exact.data(), exact.size(), 1, &network);
    if (status == SODFAST_OK) {
      sodfast_description about;
      sodfast_describe(network, &about);
      const int64_t side = about.multiple;
      const std::vector<float> image(static_cast<size_t>(about.channels * side * side), 0.5f);
      std::vector<float> logits(static_cast<size_t>(side * side));
      status = sodfast_run(network, image.data(), 1, side, side, logits.data());
    }
    sodfast_close(network);
    ++count[status];
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds > slowest) slowest = seconds;
    if (seconds > 10) return std::fprintf(stderr, "case %ld took %.1f s\n", i, seconds), 1;
  }
  std::printf("%ld cases: %ld results, %ld refused by format, %ld by argument, %ld by memory; slowest %.3f s\n", cases,
              count[SODFAST_OK], count[SODFAST_ERROR_FORMAT], count[SODFAST_ERROR_ARGUMENT],
              count[SODFAST_ERROR_MEMORY], slowest);
  return count[SODFAST_ERROR_INTERNAL] + count[SODFAST_ERROR_FILE] != 0;
}
