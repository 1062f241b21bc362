"""
A language model from a GGUF file (llama.cpp's format), as a folder that everything here opens.

    python tools/gguf_model.py SmolLM2-135M-Instruct.Q4_1.gguf --out runs/pretrained/base

The weights are dequantised to fp32: a model of four bits a weight stays as coarse as it was. Needs the
packages gguf and accelerate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.files import Failure, Flags, first_line, lock_folder, run_main


def main():
    parser = Flags(__doc__)
    parser.add_argument("file", help="the GGUF file")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    path = Path(args.file)
    if not path.is_file():
        raise Failure(f"{path}: no such file")
    tokenizer, model = read_gguf(path)

    lock_folder(args.out)
    # The quantisation is the file's. Without these lines the saved model would claim it too.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.quantization_method = None
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def read_gguf(path):
    """-> tokenizer, model in fp32. Raises Failure for a file that is broken or incomplete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # a file can be broken in as many ways as its readers have
        raise Failure(f"{path}: cannot be read as a GGUF model ({first_line(error)})") from error

    # transformers draws missing tensors at random, and only warns.
    missing = sorted(info["missing_keys"])
    if missing:
        raise Failure(
            f"{path}: lacks {len(missing)} tensors of a {model.config.model_type} model, "
            f"such as {missing[0]}"
        )
    return tokenizer, model


if __name__ == "__main__":
    run_main(main)
