"""Answers to week 8's loop that threads share, written in other ways than the grader's own."""

import itertools
import queue
import threading

from tests.course.foreign.register import right, wrong


@wrong("Contiguous halves, one for each thread.")
def share(pieces, work, threads):
    size = -(-pieces // threads)
    errors = []

    def do(begin):
        try:
            for piece in range(begin, min(begin + size, pieces)):
                work(piece)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=do, args=(i * size,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@wrong("Each thread is joined right after its start.")
def share(pieces, work, threads):
    left = list(range(pieces))[::-1]
    errors = []

    def do():
        try:
            while left:
                work(left.pop())
        except Exception as error:
            errors.append(error)

    for _ in range(threads):
        thread = threading.Thread(target=do)
        thread.start()
        thread.join()
    if errors:
        raise errors[0]


@wrong("The counter is looked at and moved on without a lock.")
def share(pieces, work, threads):
    counter = 0
    errors = []

    def do():
        nonlocal counter
        try:
            while counter < pieces:
                mine = counter
                counter += 1
                work(mine)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=do) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@wrong("The lock guards the step, but not the look: two threads may both see that one piece is left.")
def share(pieces, work, threads):
    counter = 0
    lock = threading.Lock()
    errors = []

    def do():
        nonlocal counter
        try:
            while True:
                mine = counter
                if mine >= pieces:
                    return
                with lock:
                    counter = mine + 1
                work(mine)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=do) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@wrong("Comes back when the queue is empty, while the last pieces are being worked on.")
def share(pieces, work, threads):
    waiting = queue.SimpleQueue()
    for piece in range(pieces):
        waiting.put(piece)
    gone = threading.Event()

    def do():
        while True:
            try:
                piece = waiting.get_nowait()
            except queue.Empty:
                gone.set()
                return
            if waiting.empty():
                gone.set()
            work(piece)

    for _ in range(threads):
        threading.Thread(target=do, daemon=True).start()
    gone.wait()


@wrong("Only the last thread is joined: the call stands behind the loop.")
def share(pieces, work, threads):
    numbers = itertools.count()
    errors = []

    def do():
        try:
            for piece in iter(lambda: next(numbers), None):
                if piece >= pieces:
                    return
                work(piece)
        except Exception as error:
            errors.append(error)

    for _ in range(threads):
        thread = threading.Thread(target=do)
        thread.start()
    thread.join()
    if errors:
        raise errors[0]


@wrong("An error in a thread is not caught, so nobody hears of it.")
def share(pieces, work, threads):
    numbers = iter(range(pieces))
    lock = threading.Lock()

    def do():
        while True:
            with lock:
                piece = next(numbers, None)
            if piece is None:
                return
            work(piece)

    running = [threading.Thread(target=do) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


@wrong("Batches of `threads` pieces, each batch waited for before the next.")
def share(pieces, work, threads):
    errors = []

    def do(piece):
        try:
            work(piece)
        except Exception as error:
            errors.append(error)

    for begin in range(0, pieces, threads):
        batch = [threading.Thread(target=do, args=(p,)) for p in range(begin, min(begin + threads, pieces))]
        for thread in batch:
            thread.start()
        for thread in batch:
            thread.join()
        if errors:
            raise errors[0]


@wrong("Everything is done by the caller.")
def share(pieces, work, threads):
    for piece in range(pieces):
        work(piece)


@right
def share(pieces, work, threads):
    waiting = queue.SimpleQueue()
    for piece in range(pieces):
        waiting.put(piece)
    problems = queue.SimpleQueue()

    def do():
        try:
            while problems.empty():
                work(waiting.get_nowait())
        except queue.Empty:
            pass
        except Exception as problem:
            problems.put(problem)

    running = [threading.Thread(target=do, daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if not problems.empty():
        raise problems.get()


@right
def share(pieces, work, threads):
    """Without a join: finished pieces are counted under a condition."""
    changed = threading.Condition()
    taken = finished = 0
    failed = None

    def do():
        nonlocal taken, finished, failed
        while True:
            with changed:
                if taken == pieces or failed:
                    return
                piece = taken
                taken += 1
            problem = None
            try:
                work(piece)
            except Exception as error:
                problem = error
            with changed:
                finished += 1
                failed = failed or problem
                changed.notify_all()

    for _ in range(threads):
        threading.Thread(target=do, daemon=True).start()
    with changed:
        changed.wait_for(lambda: finished == (taken if failed else pieces))
    if failed:
        raise failed
