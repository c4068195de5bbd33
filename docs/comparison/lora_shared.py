import uvicorn
from tiny import BASE

from shared.adapters import load_adapter
from shared.adapters.sft import SFTSettings, fine_tune
from shared.models.pretrained import load_model
from shared.serving.api import create_app

fine_tune(SFTSettings(model=BASE, data="mine.jsonl", out="ours", steps=4, device="cpu"))
model = load_adapter(load_model(BASE), "ours", name="mine")
uvicorn.run(create_app(model, model.tokenizer, name="base"))
