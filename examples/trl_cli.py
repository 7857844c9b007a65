"""`trl sft` with scales or cores: the same YAML and flags, with FACTORIZED and TRAIN in the environment.

    FACTORIZED=factorized TRAIN=scales python examples/trl_cli.py --config sft.yaml
    FACTORIZED=factorized accelerate launch examples/trl_cli.py --config sft.yaml

TRL's command line supports LoRA only (`use_peft`). This gives its script another `peft_config`, which is always used.
Afterwards run `surgery fold FACTORIZED OUTPUT_DIR`. For `trl dpo` and `trl grpo` import `trl.scripts.dpo` or
`trl.scripts.grpo` instead.
"""

import os

import trl
from trl.scripts.sft import main, make_parser

from surgery.peft import SpectralConfig

trl.get_peft_config = lambda model_arguments: SpectralConfig(
    factorized=os.environ["FACTORIZED"], train=os.environ.get("TRAIN", "scales")
)
if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
