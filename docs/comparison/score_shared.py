from tiny import BASE

from shared.models.pretrained import load_model
from shared.zero_shot.scoring import loglikelihoods

model = load_model(BASE)
pairs = [("The last ferry", " leaves at nine"), ("The first one", " at six")]
print([round(score.loglikelihood, 3) for score in loglikelihoods(model, model.tokenizer, pairs)])
print(model.generate(["The last ferry", "The first one at", "and"], 8, temperature=0))
