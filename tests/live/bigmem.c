/* Holds MIB mebibytes of words that do not compress well; says "ready", then waits for ever. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static uint64_t *memory;

int main(int argc, char **argv)
{
	size_t n = (argc > 1 ? strtoul(argv[1], 0, 10) : 256) << 17;
	uint64_t x = 88172645463325252ull;
	memory = malloc(n * 8);
	for (size_t i = 0; i < n; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		memory[i] = i & 1 ? x : i;
	}
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
