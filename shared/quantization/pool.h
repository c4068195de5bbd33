/* Week 8. Threads that share the pieces of one loop after another.

   One thread, the caller, goes through the loops in order. Helpers look for a loop that has pieces left, take
   one at a time, and work on it. The caller takes pieces too. When none is left it waits for those that others
   still work on: only then may the next loop begin, which reads what this one wrote. That wait is the barrier
   without which a thread would read sums that are not there yet.

   A helper whose core is taken away between two pieces holds nobody up: the others take its share.

   Before it sleeps, a thread says so and then looks once more; whoever has news for it tells them, and then asks
   whether it sleeps. One of the two sees the other, if neither's store is put off until after its load. So these
   stores are exchanges: QEMU 7.2 emulates ARM's instructions for an atomic store and the atomic load behind it
   without such a guarantee. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define MAX_THREADS 64
#define SPINS 4000 /* looks before a thread sleeps: some tens of microseconds */

typedef void (*Work)(void *task, int piece, int worker);

static struct {
  /* The number of the loop in the upper half, how many of its pieces are left in the lower: both change at
     once, so that no helper takes a piece of a loop that is over. */
  _Alignas(64) _Atomic uint64_t ticket;
  _Alignas(64) _Atomic int finished; /* pieces of this loop */
  _Alignas(64) _Atomic int sleeping; /* helpers */
  _Atomic int waiting;               /* whether the caller sleeps until the last piece is finished */
  _Atomic int threads;               /* that may take part, the caller included */
  Work work;
  void *task;
  int pieces, helpers;
  pthread_mutex_t caller; /* held by whoever calls: one at a time */
  pthread_mutex_t lock;
  pthread_cond_t wake, done;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Works on one piece, if one is left. */
static int take_piece(int worker) {
  uint64_t ticket = atomic_load(&pool.ticket);
  do {
    if (!(uint32_t)ticket || worker >= atomic_load(&pool.threads))
      return 0;
  } while (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket - 1));
  int pieces = pool.pieces;
  pool.work(pool.task, pieces - (int)(uint32_t)ticket, worker);
  if (atomic_fetch_add(&pool.finished, 1) + 1 == pieces && atomic_load(&pool.waiting)) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_signal(&pool.done);
    pthread_mutex_unlock(&pool.lock);
  }
  return 1;
}

static void *help(void *number) {
  int worker = (int)(intptr_t)number;
  for (int spins = 0;; spins++) {
    if (take_piece(worker)) {
      spins = 0;
    } else if (spins < SPINS) {
      rest();
    } else {
      pthread_mutex_lock(&pool.lock);
      while (worker >= atomic_load(&pool.threads)) /* until there are to be more */
        pthread_cond_wait(&pool.wake, &pool.lock);
      atomic_fetch_add(&pool.sleeping, 1);
      while (!(uint32_t)atomic_load(&pool.ticket) && worker < atomic_load(&pool.threads))
        pthread_cond_wait(&pool.wake, &pool.lock);
      atomic_fetch_sub(&pool.sleeping, 1);
      pthread_mutex_unlock(&pool.lock);
      spins = 0;
    }
  }
  return NULL;
}

/* A forked process has the memory of the pool, but none of its threads. */
static void forget_helpers(void) {
  pool.helpers = 0;
  atomic_store(&pool.ticket, 0);
  atomic_store(&pool.sleeping, 0);
  atomic_store(&pool.waiting, 0);
  pthread_mutex_init(&pool.caller, NULL);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.done, NULL);
}

/* Makes the pool ready for this thread and `threads` - 1 helpers. Returns how many threads there are, 1 where
   another caller uses the pool. */
static int enter_pool(int threads) {
  static int watched;
  if (threads <= 1 || pthread_mutex_trylock(&pool.caller))
    return 1;
  if (!watched)
    watched = !pthread_atfork(NULL, NULL, forget_helpers);
  threads = threads < MAX_THREADS ? threads : MAX_THREADS;
  while (pool.helpers < threads - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, help, (void *)(intptr_t)(pool.helpers + 1)))
      break;
    pthread_detach(thread);
    pool.helpers++;
  }
  if (!pool.helpers) {
    pthread_mutex_unlock(&pool.caller);
    return 1;
  }
  threads = pool.helpers + 1 < threads ? pool.helpers + 1 : threads;
  if (atomic_load(&pool.threads) != threads) {
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.threads, threads);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
  }
  return threads;
}

static void leave_pool(int threads) {
  if (threads > 1)
    pthread_mutex_unlock(&pool.caller);
}

/* Sleeps until all pieces are finished. The helper that still has one may then run on this core. */
static void sleep_until_done(void) {
  pthread_mutex_lock(&pool.lock);
  atomic_exchange(&pool.waiting, 1);
  while (atomic_load(&pool.finished) < pool.pieces)
    pthread_cond_wait(&pool.done, &pool.lock);
  atomic_store(&pool.waiting, 0);
  pthread_mutex_unlock(&pool.lock);
}

/* work(task, piece, worker) for each piece from 0 to pieces - 1, by any of `threads` workers. */
static void share(int threads, int pieces, Work work, void *task) {
  if (threads == 1 || pieces == 1) {
    for (int piece = 0; piece < pieces; piece++)
      work(task, piece, 0);
    return;
  }
  pool.work = work;
  pool.task = task;
  pool.pieces = pieces;
  atomic_store(&pool.finished, 0);
  uint64_t number = (atomic_load(&pool.ticket) >> 32) + 1;
  atomic_exchange(&pool.ticket, number << 32 | (uint32_t)pieces);
  if (atomic_load(&pool.sleeping)) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
  }
  while (take_piece(0))
    ;
  for (int spins = 0; atomic_load(&pool.finished) < pieces; spins++) {
    if (spins < SPINS) {
      rest();
    } else {
      sleep_until_done();
      return;
    }
  }
}
