"""Week 0. Pictures of weeks 10 to 12: PPO's models, DPO, answers from documents, continuous batching."""

from collections.abc import Sequence

from shared.course.pictures.drawing import Box, Picture, around
from shared.course.pictures.tables import SLOTS, TEXT_LENGTHS, continuous, in_batches

POLICY = "shared.alignment.policy"
LOOPS = "shared.alignment.loops"


def ppo() -> Picture:
    """Week 10: the four models of a step, and what each says of an answer."""
    picture = Picture(
        "PPO's four models",
        "One writes, three judge; the one that writes and one judge learn",
        "The policy writes answers to prompts. Then four models read them: the policy itself gives the"
        " log-probability of each token, the frozen reference gives its own, and their difference is the"
        " KL. The score, one number an answer, comes from a frozen reward model or a rule. The value"
        " model gives for each token what it expects. token_rewards joins score and KL, gae compares"
        " them with what was expected, and the advantages go into ppo_loss. Its gradient, dashed,"
        " reaches the policy and the value model only.",
    )
    draw = picture.box(around(240, 98, 240, 34), "draw_answers", of=f"{LOOPS}.draw_answers")
    picture.note(24, 102, "prompts")
    picture.note(368, 102, "by the policy")
    picture.arrow((78, 98), draw.left)
    models = {}
    looks = (("policy", "learned"), ("reference", "frozen"), ("score", "frozen"), ("value", "learned"))
    for i, (name, kind) in enumerate(looks):
        x = 78 + 108 * i
        models[name] = picture.box(around(x, 196, 92, 42), name, kind, of=f"ppo.{name}")
        if i in (0, 3):
            picture.arrow((240, 144), (x, 144), (x, 175))
        else:
            picture.arrow((x, 144), (x, 175))
    picture.line(draw.bottom, (240, 144))
    picture.shape(249, 135, "[B, A]", "ppo.ids", anchor="start")
    picture.box(around(132, 300, 120, 34), "kl_estimate", of="shared.alignment.logprobs.kl_estimate")
    for x in (78, 186):
        picture.arrow((x, 217), (x, 283))
    picture.shape(132, 256, "[B, A−1]", "ppo.logp")
    picture.box(around(213, 376, 140, 34), "token_rewards", of=f"{POLICY}.token_rewards")
    picture.arrow((170, 317), (170, 359))
    picture.arrow((294, 217), (294, 340), (250, 340), (250, 359))
    picture.shape(303, 256, "[B]", "ppo.scores", anchor="start")
    picture.box(around(300, 456, 140, 34), "gae", of=f"{POLICY}.gae")
    picture.arrow((258, 393), (258, 439))
    picture.arrow((402, 217), (402, 416), (342, 416), (342, 439))
    loss = picture.box(around(240, 536, 180, 36), "ppo_loss", "chosen", of=f"{POLICY}.ppo_loss")
    picture.arrow((280, 473), (280, 518))
    picture.shape(289, 500, "[B, A−1]", "ppo.advantages", anchor="start")
    picture.arrow(loss.left, (24, 536), (24, 196), models["policy"].left, again=True)
    picture.arrow(loss.right, (458, 536), (458, 196), models["value"].right, again=True)
    picture.note(34, 526, "learns")
    picture.note(448, 526, "learns", anchor="end")
    return picture.close("chosen")


def dpo() -> Picture:
    """Week 10: a pair of answers, two models, one margin."""
    picture = Picture(
        "DPO",
        "No reward model, no drawing: a better and a worse answer",
        "A pair of answers to one prompt, the chosen and the rejected. The policy and the frozen"
        " reference each give the summed log-probability of both. For each answer the reference's is"
        " taken from the policy's: by how much more likely has the policy made it. The loss is low where"
        " the chosen answer has gained more than the rejected one; its gradient reaches the policy only.",
    )
    chosen = picture.box(around(130, 100, 150, 36), "chosen answer", "values")
    rejected = picture.box(around(350, 100, 150, 36), "rejected answer", "values")
    policy = picture.box(around(130, 206, 170, 44), "policy", "learned", of="dpo.policy")
    reference = picture.box(around(350, 206, 170, 44), "reference", "frozen", of="dpo.reference")
    picture.line(chosen.bottom, (130, 150), (350, 150), rejected.bottom)
    picture.arrow((130, 150), policy.top)
    picture.arrow((350, 150), reference.top)
    picture.shape(240, 142, "[2B, A]", "dpo.ids")
    picture.box(
        around(240, 300, 220, 36), "sequence_logprobs", of="shared.alignment.logprobs.sequence_logprobs"
    )
    picture.arrow((190, 228), (190, 282))
    picture.arrow((290, 228), (290, 282))
    picture.shape(240, 260, "[2B, A, V]", "dpo.logits")
    rows = (("chosen", 130), ("rejected", 350))
    for name, x in rows:
        side = 190 if x == 130 else 290
        picture.box(around(x, 400, 190, 52), "", "values")
        picture.write(x, 396, f"gain of the {name}", size=13)
        picture.note(x, 414, "log policy − log reference", anchor="middle")
        picture.arrow((side, 318), (side, 374))
    picture.shape(240, 350, "[B]", "dpo.chosen")
    loss = picture.box(around(240, 490, 250, 52), "", "chosen")
    picture.name(240, 486, "dpo_loss", "shared.alignment.dpo.dpo_loss")
    picture.note(240, 504, "−log σ(beta · (gain − gain))", anchor="middle")
    picture.arrow((190, 426), (190, 464))
    picture.arrow((290, 426), (290, 464))
    picture.arrow(loss.left, (24, 490), (24, 206), policy.left, again=True)
    picture.note(32, 510, "learns")
    return picture.close()


def rag() -> Picture:
    """Week 11: once the documents, then each question."""
    picture = Picture(
        "Answers from documents",
        "Find the passages first; then let the model read them",
        "Two strands. Once, on the left: documents are cut into chunks, an embedder turns each into a"
        " vector, and the index keeps them. For each question, on the right: the same embedder turns the"
        " question into a vector, and search finds the chunks that are nearest. compose puts them before"
        " the question, in one prompt, the model goes on from there, and the reply names the sources"
        " that it rests on. A question that is near to nothing is refused.",
    )
    left, right = 124, 356
    picture.group(Box(24, 80, 200, 306))
    picture.write(34, 99, "once", size=12, anchor="start", bold=True)
    picture.group(Box(256, 80, 200, 306))
    picture.write(266, 99, "for each question", size=12, anchor="start", bold=True)
    documents = picture.box(around(left, 132, 140, 34), "documents", "values", behind=2)
    chunk = picture.box(around(left, 206, 168, 34), "chunk_documents", of="shared.retrieval.chunk_documents")
    embed = picture.box(
        around(left, 276, 168, 34), "embed", "learned", of="shared.retrieval.embedders.Embedder.embed"
    )
    index = picture.box(around(left, 352, 168, 38), "Index", "values", of="shared.retrieval.Index")
    picture.arrow(documents.bottom, chunk.top)
    picture.arrow(chunk.bottom, embed.top)
    picture.arrow(embed.bottom, index.top, shape=("[K, E]", "rag.passages"))
    question = picture.box(around(right, 132, 140, 34), "question", "values")
    ask = picture.box(
        around(right, 242, 168, 34),
        "embed_questions",
        "learned",
        of="shared.retrieval.embedders.Embedder.embed_questions",
    )
    search = picture.box(around(right, 352, 168, 38), "search", of="shared.retrieval.Index.search")
    picture.arrow(question.bottom, ask.top)
    picture.arrow(ask.bottom, search.top, shape=("[1, E]", "rag.question"))
    picture.arrow(index.right, search.left)
    compose = picture.box(around(240, 452, 200, 36), "compose", of="shared.retrieval.rag.compose")
    picture.arrow(search.bottom, (right, 452), compose.right)
    picture.note(366, 430, "the nearest\npassages")
    model = picture.box(around(240, 532, 200, 40), "the model", "learned")
    picture.arrow(compose.bottom, model.top)
    picture.note(250, 496, "passages, then the question")
    reply = picture.box(around(240, 612, 200, 38), "Reply", "chosen", of="shared.retrieval.rag.Reply")
    picture.arrow(model.bottom, reply.top)
    picture.note(352, 608, "with the sources\nthat it rests on")
    picture.note(24, 662, "Where nothing is near enough, the question is\nrefused, and no model is asked.")
    return picture.close()


def continuous_batching() -> Picture:
    """Week 12: a slot that becomes free is filled at once."""
    batched, joined = in_batches(TEXT_LENGTHS, SLOTS), continuous(TEXT_LENGTHS, SLOTS)
    picture = Picture(
        "Continuous batching",
        "A slot that becomes free takes the next text at once",
        f"Two timetables of {SLOTS} slots, a column for each step of the model, for the same"
        f" {len(TEXT_LENGTHS)} texts. Above, in batches: the next texts begin when all of the last ones"
        f" have ended, after {len(batched[0])} steps in all, and many places are empty. Below,"
        " continuously: a text begins in the step after another one has ended in that slot, and all are"
        f" written after {len(joined[0])} steps.",
    )
    steps = max(len(batched[0]), len(joined[0]))
    cell = 400 / steps
    for top, words, table in ((110, "in batches", batched), (286, "continuously", joined)):
        used = sum(text >= 0 for row in table for text in row)
        share = used / (SLOTS * len(table[0]))
        picture.write(24, top - 14, words, anchor="start", bold=True)
        picture.note(456, top - 14, f"{len(table[0])} steps, {share:.0%} of the places used", anchor="end")
        for slot, row in enumerate(table):
            y = top + 28 * slot
            picture.note(24, y + 17, f"slot {slot}")
            _texts(picture, row, 70, y, cell * 0.96)
    picture.note(70, 248, "step 1, 2, 3, ...")
    y = 286 + 28 * SLOTS + 26
    picture.note(
        24,
        y,
        "A strip is one text, a cell one token that is written. All cells of a column\nare"
        " one forward pass, a row for each slot, at positions of their own:",
    )
    picture.shape(24, y + 36, "[S, 1]", "slots.positions", anchor="start")
    picture.note(86, y + 36, "in one")
    picture.name(128, y + 36, "SlotCache", "shared.serving.slots.SlotCache", anchor="start")
    return picture.close("values")


def _texts(picture: Picture, row: Sequence[int], x: float, y: float, cell: float) -> None:
    """A slot's row: a strip for each text, its letter in it, and nothing where it is idle."""
    start = 0
    while start < len(row):
        end = start
        while end < len(row) and row[end] == row[start]:
            end += 1
        if row[start] >= 0:
            letters = [["" for _ in range(end - start)]]
            letters[0][0] = "abcdefghijkl"[row[start]]
            parts = [[row[start] % 4] * (end - start)]
            picture.grid(x + cell * start, y, letters, cell=(cell, 24), parts=parts)
        start = end
