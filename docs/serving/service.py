"""The merged export as a BentoML service: a question in, reasoning and answer out, over plain HTTP.

MODEL=runs/demo/export/merged bentoml serve docs/serving/service.py:Medical --host 127.0.0.1 --port 3000
"""

import os

import bentoml
from transformers import AutoModelForCausalLM, AutoTokenizer


@bentoml.service(envs=[{"name": "MODEL"}], traffic={"timeout": 600})  # seconds; one question at a time, the others wait
class Medical:
    """Answers in the prompt format of training, which the chat template in the folder MODEL gives."""

    def __init__(self) -> None:
        folder, safe = os.environ["MODEL"], {"trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto", **safe).eval()

    @bentoml.api
    def answer(self, question: str, max_new_tokens: int = 1024, temperature: float = 0.0) -> dict:
        """Greedy at temperature 0, else sampled; `tokens` are the ids of all that was generated, the end token included."""
        turn = [{"role": "user", "content": question}]
        inputs = self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        reasoning, _, answer = self.tokenizer.decode(tokens, skip_special_tokens=True).partition("</think>")
        return {"reasoning": reasoning.strip(), "answer": answer.strip(), "tokens": tokens}
