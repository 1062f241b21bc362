"""
A language model from a GGUF file (llama.cpp's format), as a folder that everything here opens.

    python data/gguf_model.py SmolLM2-135M-Instruct.Q4_1.gguf --out runs/pretrained/base

The weights are dequantised: a model of four bits a weight stays as coarse as it was, in fp32. Needs the packages
gguf and accelerate.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from files import Flags, claim, fail


def main():
    ap = Flags(__doc__)
    ap.add_argument("file", help="the GGUF file")
    ap.add_argument("--out", required=True, help="folder to write")
    args = ap.parse_args()
    if not Path(args.file).is_file():
        fail(f"{args.file}: no such file")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    where = dict(pretrained_model_name_or_path=Path(args.file).parent, gguf_file=Path(args.file).name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, info = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    except Exception as e:                  # a file can be broken in as many ways as its readers have
        fail(f"{args.file}: cannot be read as a GGUF model ({str(e)[:150] or type(e).__name__})")
    if missing := sorted(info["missing_keys"]):         # which transformers draws at random, with a warning
        fail(f"{args.file}: lacks {len(missing)} tensors of a {model.config.model_type} model, such as {missing[0]}")
    claim(Path(args.out))
    del model.config.quantization_config                # of the file; these weights have none
    model.hf_quantizer = model.quantization_method = None
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
