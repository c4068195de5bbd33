from tiny import BASE

from shared.models.pretrained import load_model
from shared.serving.engine import Engine
from shared.serving.generation import Request
from shared.zero_shot.scoring import loglikelihoods

model = load_model(BASE)
pairs = [("The last ferry", " leaves at nine"), ("The first one", " at six")]
print([round(score.loglikelihood, 3) for score in loglikelihoods(model, model.tokenizer, pairs)])
engine = Engine(model)
prompts = [model.tokenizer.encode(prompt) for prompt in ("The last ferry", "The first one at", "and")]
running = [engine.submit(Request(ids, max_new_tokens=8, temperature=0.0)) for ids in prompts]
print([model.tokenizer.decode([token.id for token in generation]) for generation in running])
engine.close()
