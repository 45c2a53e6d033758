/* Every kind of mapping, with contents. */
#include "self.h"
#include <sys/prctl.h>
#include <sys/resource.h>

#define MB (1 << 20)
static char *anon, *shared, *file, *mem_rw, *mem_ro, *none, *huge, *wiped, *locked, *cut;
static __thread long tls = 0x1234567890;
static long bss[100000], data[1000] = {1, 2, 3};
static char *heap[1000];
static int round_no;

static unsigned char pattern(size_t i, int seed) { return (i * 2654435761u >> 13) + seed + round_no; }
static void paint(char *p, size_t n, int seed) { for (size_t i = 0; i < n; i++) p[i] = pattern(i, seed); }
static int same(char *p, size_t n, int seed) {
    for (size_t i = 0; i < n; i++) if ((unsigned char)p[i] != pattern(i, seed)) return 0;
    return 1;
}
static void fill(void) {
    paint(anon, 3 * MB, 1);
    paint(shared, MB, 2);
    paint(file + 4096, 4096, 3);
    paint(mem_rw, 65536, 4);
    mprotect(none, 8192, PROT_READ | PROT_WRITE);
    paint(none, 8192, 5);
    mprotect(none, 8192, PROT_NONE);
    paint(huge, 8 * MB, 6);
    paint(wiped, 4096, 7);
    paint(locked, 8192, 8);
    paint(cut, 4096, 9);
    paint(cut + 3 * 4096, 4096, 10);
    for (int i = 0; i < 1000; i++) paint(heap[i], 100 + i, i);
    for (int i = 0; i < 100000; i++) bss[i] = i ^ round_no;
    data[500] = 77 + round_no;
    tls = 0x1234567890 + round_no;
}
/* VmFlags line of the mapping at an address. */
static int has_flag(void *at, const char *flag) {
    FILE *f = fopen("/proc/self/smaps", "r");
    char line[512];
    int here = 0, found = 0;
    while (fgets(line, sizeof line, f)) {
        unsigned long a, b;
        if (sscanf(line, "%lx-%lx ", &a, &b) == 2) here = (unsigned long)at >= a && (unsigned long)at < b;
        else if (here && !strncmp(line, "VmFlags:", 8)) found = strstr(line, flag) != NULL;
    }
    fclose(f);
    return found;
}
static void check(void) {
    CHECK(same(anon, 3 * MB, 1));
    CHECK(same(shared, MB, 2));
    CHECK(file[0] == 0x7f && file[1] == 'E' && same(file + 4096, 4096, 3));
    CHECK(same(mem_rw, 65536, 4) && same(mem_ro, 65536, 4));
    mem_rw[77] ^= 1;
    CHECK(mem_ro[77] == mem_rw[77]); /* one object still */
    mem_rw[77] ^= 1;
    CHECK(mprotect(none, 8192, PROT_READ) == 0 && same(none, 8192, 5));
    CHECK(same(huge, 8 * MB, 6) && has_flag(huge, " hg"));
    CHECK(same(wiped, 4096, 7) && has_flag(wiped, " wf") && has_flag(wiped, " dd"));
    CHECK(same(locked, 8192, 8) && has_flag(locked, " lo"));
    CHECK(same(cut, 4096, 9) && same(cut + 3 * 4096, 4096, 10));
    CHECK(msync(cut + 4096, 4096, MS_ASYNC) == -1 && errno == ENOMEM); /* the hole is a hole */
    for (int i = 0; i < 1000; i++) CHECK(same(heap[i], 100 + i, i));
    for (int i = 0; i < 100000; i++) if (bss[i] != (i ^ round_no)) { bad("bss[%d]", i); break; }
    CHECK(data[500] == 77 + round_no && data[1] == 2 && tls == 0x1234567890 + round_no);
    /* The heap goes on growing, in brk and in mmap. */
    void *before = sbrk(0);
    CHECK(sbrk(65536) == before && sbrk(0) == (char *)before + 65536);
    for (int i = 0; i < 1000; i += 2) { free(heap[i]); heap[i] = malloc(100 + i); }
    char *big = malloc(30 * MB);
    CHECK(big != NULL);
    memset(big, 1, 30 * MB);
    free(big);
    /* The stack grows. */
    char deep[256 * 1024];
    memset(deep, round_no, sizeof deep);
    CHECK(deep[sizeof deep / 2] == (char)round_no);
    struct timespec ts;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &ts) == 0 && ts.tv_sec > 0); /* vdso */
    char exe[256] = {0}, line[4096] = {0};
    CHECK(readlink("/proc/self/exe", exe, 255) > 0 && strstr(exe, "memzoo"));
    int fd = open("/proc/self/cmdline", O_RDONLY);
    read(fd, line, sizeof line);
    close(fd);
    CHECK(strstr(line, "memzoo") && !strcmp(line + strlen(line) + 1 + strlen(line + strlen(line) + 1) + 1, "third argument"));
    fd = open("/proc/self/maps", O_RDONLY);
    FILE *maps = fdopen(fd, "r");
    int stack = 0, brk = 0, vdso = 0;
    while (fgets(line, sizeof line, maps)) {
        stack += strstr(line, "[stack]") != NULL;
        brk += strstr(line, "[heap]") != NULL;
        vdso += strstr(line, "[vdso]") != NULL;
    }
    fclose(maps);
    CHECK(stack == 1 && brk >= 1 && vdso == 1);
    round_no++;
    fill();
}

int main(int argc, char **argv) {
    (void)argc;
    start_listening(argv[1]);
    anon = mmap(NULL, 3 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    shared = mmap(NULL, MB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int fd = open(argv[0], O_RDONLY);
    file = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    close(fd);
    fd = memfd_create("shared pages", 0);
    ftruncate(fd, 65536);
    mem_rw = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    mem_ro = mmap(NULL, 65536, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    none = mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    huge = mmap(NULL, 8 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(huge, 8 * MB, MADV_HUGEPAGE);
    wiped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(wiped, 4096, MADV_WIPEONFORK);
    madvise(wiped, 4096, MADV_DONTDUMP);
    locked = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mlock(locked, 8192);
    cut = mmap(NULL, 4 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    munmap(cut + 4096, 8192);
    for (int i = 0; i < 1000; i++) heap[i] = malloc(100 + i);
    fill();
    serve(check);
}
