// How fast memory can be read: `bandwidth MEGABYTES THREADS` prints GB/s, of the best of its passes.
// Each thread sums its part of the memory, which is far more than the caches hold, or as much as a model's weights.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { LANES = 32, AHEAD = 256, MOST_THREADS = 64 };  // in words of 8 bytes
static const double SECONDS = 1.0;

typedef struct {
  const uint64_t *words;
  size_t count;
  uint64_t sum;
} Part;

static void *read_part(void *given) {
  Part *part = given;
  uint64_t sums[LANES] = {0};
  for (size_t at = 0; at < part->count; at += LANES) {
    for (int lane = 0; lane < LANES; lane += 8) __builtin_prefetch(part->words + at + AHEAD + lane);
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += part->words[at + lane];
  }
  for (int lane = 0; lane < LANES; ++lane) part->sum += sums[lane];
  return NULL;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static double pass(const char *data, size_t bytes, int threads) {
  Part parts[MOST_THREADS];
  pthread_t ids[MOST_THREADS];
  size_t count = bytes / 8 / (size_t)threads / LANES * LANES;
  double start = now();
  for (int i = 0; i < threads; ++i) {
    parts[i] = (Part){(const uint64_t *)data + (size_t)i * count, count, 0};
    pthread_create(&ids[i], NULL, read_part, &parts[i]);
  }
  for (int i = 0; i < threads; ++i) pthread_join(ids[i], NULL);
  return (double)count * 8 * threads / (now() - start) / 1e9;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  size_t bytes = (size_t)strtoull(argv[1], NULL, 10) * 1000000;
  int threads = atoi(argv[2]);
  if (threads < 1 || threads > MOST_THREADS) return 2;
  char *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return 1;
  madvise(data, bytes, MADV_HUGEPAGE);
  memset(data, 1, bytes);
  double best = 0;
  for (double end = now() + SECONDS; now() < end;) {
    double found = pass(data, bytes, threads);
    best = found > best ? found : best;
  }
  printf("%.2f\n", best);
  return 0;
}
