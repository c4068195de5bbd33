"""Week 0. Pictures of training: the loop (week 2), several processes (week 6), half the bits (week 7)."""

from shared.course.pictures.drawing import Box, Picture, around

TASK = "shared.training.tasks.Task"
CONFIG = "shared.training.config.TrainConfig"


def training_loop() -> Picture:
    """Week 2: a batch, a loss, gradients, a step; and again."""
    picture = Picture(
        "The training loop",
        "Predict, measure, find out which way is down, take a small step",
        "A ring that is gone round at every step. The task gives a batch: ids and, one place further, the"
        " targets. The model turns the ids into logits; the loss compares them with the targets and is one"
        " number. Its backward gives each weight a gradient of the weight's own shape. Gradients that are too"
        " long are clipped, and the optimizer moves the weights by a step whose length lr_at says. Now and"
        " then, outside of the ring, the Trainer evaluates on the validation split and writes the checkpoints"
        " last and best.",
    )
    left, right = 129, 386
    batch = picture.box(around(left, 106, 130, 36), "batches", "values", of=f"{TASK}.batches")
    model = picture.box(around(left, 206, 130, 46), "model", "learned", of="trainer.model")
    loss = picture.box(around(left, 316, 130, 36), "loss", of=f"{TASK}.loss")
    picture.arrow(batch.bottom, model.top, shape=("[B, T]", "loop.ids"))
    picture.note(left - 8, 156, "ids", anchor="end")
    picture.arrow(model.bottom, loss.top, shape=("[B, T, V]", "loop.logits"))
    picture.note(left - 8, 276, "logits", anchor="end")
    picture.arrow(batch.left, (36, 106), (36, 316), loss.left)
    picture.note(36, 352, "targets: the ids,\none place further on")
    picture.shape(210, 368, "[B, T]", "loop.targets")
    back = picture.box(around(right, 316, 140, 36), "backward", of="torch.Tensor.backward")
    picture.arrow(loss.right, back.left, shape=("[]", "loop.loss"))
    picture.note(right - 70, 352, "a gradient for each\nweight, of its shape")
    clip = picture.box(around(right, 236, 140, 36), "grad_clip", of=f"{CONFIG}.grad_clip")
    picture.arrow(back.top, clip.bottom)
    step = picture.box(around(right, 156, 140, 36), "step", of="torch.optim.AdamW.step")
    picture.arrow(clip.top, step.bottom)
    rate = picture.box(around(right, 94, 140, 30), "lr_at", of="shared.training.config.lr_at")
    picture.arrow(rate.bottom, step.top)
    picture.arrow(step.left, (255, 156), (255, 206), model.right)
    picture.note(262, 182, "new\nweights")
    picture.line((24, 396), (456, 396), again=True)
    picture.write(24, 422, "now and then", size=13, anchor="start", bold=True)
    picture.name(150, 446, "eval_every", f"{CONFIG}.eval_every", anchor="end")
    picture.note(164, 446, "the loss on the validation split")
    picture.name(150, 470, "checkpoints", "trainer.checkpoints", anchor="end")
    picture.note(164, 470, "the weights now (last), and the best so far")
    return picture.close()


WEIGHTS = (1.0, 0.5)
GRADIENTS = ((0.2, -0.4), (0.6, 0.0))
LR = 0.5


def ddp() -> Picture:
    """Week 6: two processes, half a batch each, the mean of their gradients, the same step."""
    mean = [sum(pair) / 2 for pair in zip(*GRADIENTS, strict=True)]
    after = [w - LR * g for w, g in zip(WEIGHTS, mean, strict=True)]
    picture = Picture(
        "Data parallelism (DDP)",
        "Half of the batch each, one mean gradient, the same step",
        "One batch is cut in two. Both processes hold the same weights. Each computes the gradients of its"
        " half, which differ. all_reduce takes the mean of both, and both get it. So both take the same step"
        " and hold the same weights again.",
    )
    batch = picture.box(around(240, 100, 130, 34), "one batch", "values")
    picture.shape(314, 104, "[2B, T]", "ddp.batch", anchor="start")
    for x in (124, 356):
        picture.group(Box(x - 100, 136, 200, 432))
    both = picture.box(Box(44, 330, 392, 50), "", "step")
    picture.name(240, 351, "all_reduce", "torch.distributed.all_reduce")
    picture.note(240, 369, "the mean of both, to both", anchor="middle")
    for process, x in enumerate((124, 356)):
        picture.write(x - 90, 154, f"process {process}", size=12, anchor="start", bold=True)
        model = picture.box(around(x, 214, 120, 44), "the model", "learned")
        picture.arrow(batch.bottom, (240, 127), (x, 127), model.top)
        picture.shape(x + 9, 180, "[B, T]", f"ddp.half{process}", anchor="start")
        picture.note(x, 254, f"weights {WEIGHTS[0]:g} and {WEIGHTS[1]:g}", anchor="middle")
        gradient = picture.grid(x - 38, 274, [GRADIENTS[process]], cell=(38, 26))
        picture.line(model.bottom, (x, 240))
        picture.arrow((x, 260), (x, 274))
        picture.note(x - 44, 291, "gradient", anchor="end")
        picture.arrow(gradient.bottom, (x, 330))
        same = picture.grid(x - 38, 412, [mean], cell=(38, 26))
        picture.arrow((x, both.bottom[1]), same.top)
        step = picture.box(around(x, 482, 120, 34), f"step, lr {LR:g}")
        picture.arrow(same.bottom, step.top)
        weights = picture.grid(x - 44, 524, [after], cell=(44, 28), kind="chosen")
        picture.arrow(step.bottom, weights.top)
        picture.note(x - 50, 542, "weights", anchor="end")
    return picture.close()


def fsdp() -> Picture:
    """Week 6: each process keeps a part of every weight, and puts them together while they are used."""
    picture = Picture(
        "Sharding (FSDP)",
        "Each keeps half of every weight, whole only while it is used",
        "Two processes. Each keeps one half of the rows of every weight; the other half lies with the"
        " other process. Before a block is computed, all_gather gives both the whole weight; after it,"
        " what is not their own is dropped again. In the backward, reduce_scatter gives each the mean"
        " gradient of its half, and each takes the optimizer's step on that half alone, whose moments"
        " nobody else keeps.",
    )
    rows = (
        (96, "what is kept", ((0, -1), (-1, 1)), "[C/2, C]", "fsdp.kept"),
        (226, "while a block is computed", ((0, 1), (0, 1)), "[C, C]", "fsdp.used"),
        (446, "gradient of the own half", ((2, -1), (-1, 2)), "[C/2, C]", "fsdp.gradient"),
    )
    picture.group(Box(24, 84, 200, 526))
    picture.group(Box(256, 84, 200, 526))
    for process, x in enumerate((124, 356)):
        picture.write(x - 90, 102, f"process {process}", size=12, anchor="start", bold=True)
        for top, what, owners, words, of in rows:
            picture.note(x, top + 26, what, anchor="middle")
            halves = [[f"half {i}" if owner >= 0 else ""] for i, owner in enumerate(owners[process])]
            picture.grid(
                x - 60, top + 34, halves, cell=(70, 22), parts=[[owner] for owner in owners[process]]
            )
            picture.shape(x + 18, top + 60, words, of, anchor="start")
        work = picture.box(around(x, 344, 150, 34), "forward, backward")
        picture.arrow((x, 174), (x, 200))
        picture.arrow((x, 304), work.top)
        picture.arrow(work.bottom, (x, 388))
        picture.arrow((x, 424), (x, 460))
        step = picture.box(around(x, 574, 150, 34), "step", of="torch.optim.AdamW.step")
        picture.arrow((x, 524), step.top)
    picture.box(Box(44, 200, 392, 34), "all_gather", of="torch.distributed.all_gather")
    picture.box(Box(44, 388, 392, 34), "reduce_scatter", of="torch.distributed.reduce_scatter")
    picture.note(240, 634, "memory for weights, gradients and moments: a half each", anchor="middle")
    return picture.close()
