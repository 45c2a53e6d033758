// One program in two versions (-DV2): every way in which state has to be carried.
#define _GNU_SOURCE
#include <alloca.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef V2
#define NEW(...) __VA_ARGS__
#define V(a, b) b
#else
#define NEW(...)
#define V(a, b) a
#endif

#define KEEP __attribute__((used))

enum kind { NEW(KIND_NONE,) KIND_A, KIND_B, KIND_C };

struct node {                   // 40 bytes fill their chunk; 56 in V2: moves
	struct node *next;
	int id;
	V(int gone;,)
	NEW(long extra;)
	char *name;
	void (*fn)(int);
	enum kind kind;
	NEW(long more;)
};

struct small {                  // 16 bytes; 24 in V2: in place
	long a;
	NEW(long b;)
	struct node *node;
};

struct steady { struct node *node; const char *text; int *id_of; };

struct item { long a; NEW(long pad;) void (*fn)(int); };     // an array of them

struct flex { int n; NEW(long pad;) char data[]; };

struct command { const char *name; void (*run)(int); int calls; };

static void one(int x) { printf("one %d\n", x); }
static void two(int x) { printf("two %d\n", x); }
#ifdef V2
static void three(int x) { printf("three %d\n", x); }
#endif

static KEEP struct command table[] = { { "ONE", one, 0 }, NEW({ "THREE", three, 0 },) { "TWO", two, 0 } };
static KEEP const struct command fixed[] = { NEW({ "NEWEST", three, 0 },) { "ONE", one, 0 }, { "TWO", two, 0 } };

static KEEP struct node *list;
static KEEP struct small *small;
static KEEP struct steady *steady;
static KEEP struct flex *flex;
static KEEP V(int, long) counter;
static KEEP V(int old_name, int new_name);
static KEEP const char *unchanged = V("one", "two");
static KEEP void *opaque;
static KEEP char hidden[32] __attribute__((aligned(8)));
static KEEP char packed[32] __attribute__((aligned(8)));
static KEEP const struct command *last;
static KEEP struct command *hot;
static KEEP pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static KEEP __thread int tls_count;
static KEEP __thread struct node *tls_node;
static KEEP struct node **array;
static KEEP pthread_t me;
static KEEP pid_t my_pid;
static KEEP struct node inline_node;
static KEEP struct node *to_inline;
static KEEP struct item *items, *third;
static KEEP void *any;
static KEEP struct command twins[] = { NEW({ "NEW", three, 0 },) { "X", one, 0 }, { "X", two, 0 } };
static KEEP struct node *apart;

int main(int argc, char **argv) {
	const char *mode = argc > 1 ? argv[1] : "";
	array = calloc(4, sizeof *array);
	for (int i = 0; i < 3; i++) {
		struct node *n = calloc(1, sizeof *n);
		n->next = list;
		n->id = 100 + i;
		n->name = strdup("name of a node");
		n->fn = i % 2 ? one : two;
		n->kind = KIND_B;
		list = n;
		array[i] = n;
	}
	small = calloc(1, sizeof *small);
	small->a = 7;
	small->node = list->next;
	steady = calloc(1, sizeof *steady);
	steady->node = list;
	steady->text = "literal";
	steady->id_of = &list->next->id;
	flex = calloc(1, sizeof *flex + 100);
	flex->n = 100;
	strcpy(flex->data, "flexible");
	counter = 12345;
	V(old_name, new_name) = 77;
	void **o = opaque = malloc(64);
	memset(o, 0, 64);
	o[0] = list;
	o[1] = (void *)two;
	o[2] = &counter;
	o[3] = (char *)list + offsetof(struct node, name);
	memcpy(hidden, &list, sizeof list);
	void *fn = (void *)one;
	memcpy(hidden + 8, &fn, sizeof fn);
	last = &fixed[V(1, 2)];
	hot = &table[V(1, 2)];
	hot->calls = 5;
	me = pthread_self();
	my_pid = getpid();
	tls_count = 3;
	tls_node = list;
	inline_node.id = 9;
	inline_node.fn = two;
	to_inline = &inline_node;
	if (!strcmp(mode, "unaligned")) memcpy(packed + 3, &list, sizeof list);
	if (!strcmp(mode, "middle")) list->fn = (void (*)(int))((char *)one + 4);
	if (!strcmp(mode, "locked")) pthread_mutex_lock(&lock);
	if (!strcmp(mode, "conflict")) small->node = (struct node *)steady;
	if (!strcmp(mode, "stack")) small->node = (struct node *)alloca(100);
	if (!strcmp(mode, "untyped")) {
		struct node *n = calloc(1, sizeof *n);
		n->name = "x";
		n->fn = one;
		((void **)opaque)[5] = n;
	}
	if (!strcmp(mode, "any")) {
		struct node *n = any = calloc(1, sizeof *n);
		n->id = 55;
		n->fn = one;
		n->next = list;
	}
	if (!strcmp(mode, "twins")) twins[V(0, 1)].calls = 1;
	if (!strcmp(mode, "tail")) apart = memset(malloc(200), 0x41, 200);
	if (!strcmp(mode, "mapping")) apart = (struct node *)((char *)mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + 64);
	if (!strcmp(mode, "gone")) ((void **)opaque)[4] = (char *)list + offsetof(struct node, id) + 4;
	if (!strcmp(mode, "gone-typed")) steady->id_of = (int *)((char *)list + offsetof(struct node, id) + 4);
	if (!strcmp(mode, "dead")) {
		struct node *n = calloc(1, sizeof *n);
		n->fn = one;
		n->name = "nobody refers to this";
	}
	if (!strcmp(mode, "short")) small->node = malloc(24);
	items = calloc(5, sizeof *items);
	for (int i = 0; i < 5; i++) { items[i].a = i; items[i].fn = i % 2 ? one : two; }
	third = &items[2];
	printf("A items %lx\n", (unsigned long)items);
	printf("T %ld %lx\n", syscall(SYS_gettid), (unsigned long)pthread_self());
	for (struct node *n = list; n; n = n->next) printf("N %lx %lx\n", (unsigned long)n, (unsigned long)n->name);
	printf("A small %lx\nA steady %lx\nA flex %lx\nA opaque %lx\nA array %lx\n", (unsigned long)small, (unsigned long)steady, (unsigned long)flex, (unsigned long)opaque, (unsigned long)array);
	printf("A text %lx\n", (unsigned long)steady->text);
	printf("ready\n");
	fflush(stdout);
	for (;;) pause();
}
