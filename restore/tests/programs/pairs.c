/* Start-up objects for pairing: `pairs MODE`; prints "ready" and waits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct worker { int id; struct worker *next; void *scratch; };
struct config { char *name; struct worker *workers[3]; struct config *backup; };
struct table { long n; struct worker *owner; };

struct config *config;      /* direct */
struct worker *list;        /* order may differ */
struct worker *first, *second; /* aliases in mode "alias" */
struct table *fresh;        /* only mode "extra" makes it */
void *opaque;               /* block of pointers without a type */
void *lonely;               /* old has none in mode "lonely" */

int main(int argc, char **argv) {
	const char *mode = argv[1];
	(void)argc;
	/* Different sizes first, so that equal addresses are no accident. */
	if (strcmp(mode, "old")) free(malloc(12345));
	config = calloc(1, sizeof *config);
	config->name = strdup(mode);
	struct worker *w[3];
	for (int i = 0; i < 3; i++) {
		w[i] = calloc(1, sizeof **w);
		w[i]->id = i;
		w[i]->scratch = malloc(100 + i);
		memset(w[i]->scratch, i, 100 + i);
		config->workers[i] = w[i];
	}
	int up = strcmp(mode, "reversed") != 0;
	for (int k = 0; k < 3; k++) {
		int i = up ? k : 2 - k;
		w[i]->next = list;
		list = w[i];
	}
	config->backup = calloc(1, sizeof *config);
	config->backup->name = strdup("backup");
	first = calloc(1, sizeof *first);
	second = strcmp(mode, "old") ? calloc(1, sizeof *second) : first;
	void **block = calloc(8, sizeof *block);
	block[3] = malloc(64);
	memset(block[3], 7, 64);
	opaque = block;
	if (!strcmp(mode, "extra")) {
		fresh = calloc(1, sizeof *fresh);
		fresh->owner = w[1];
	}
	if (strcmp(mode, "old")) lonely = malloc(300);
	if (write(1, "ready\n", 6) != 6) return 1;
	char c;
	return (int)read(0, &c, 1);
}
