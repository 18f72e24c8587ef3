#!/usr/bin/env bash
# LLaDA-8B-Instruct and Dream-v0-Base-7B in the evaluation harness, at the settings of the dKV-Cache paper.
#
#     pip install '.[eval]' 'lm_eval[math]'    # math: for MATH-500
#     bash examples/lm_eval.sh                 # on a CPU: DEVICE=cpu bash examples/lm_eval.sh
#     LAUNCH="torchrun --nproc_per_node 8" bash examples/lm_eval.sh    # eight GPUs share the documents of each task
#
# Lengths, blocks, shots and refresh intervals are those of the paper's tables 1 to 3 and 5. Exception: Dream on MATH-500
# is not in them and takes the length and shots of Dream's authors for MATH. Dream's temperature, top_p and BOS are those
# of its own evaluation script. The paper's tables use shift=un; un_right (dkv's default) was more accurate.
# The paper does not name its prompts, so these are the harness's closest tasks: compare policies with each other (add
# policy=NoCache), not with the printed scores. GPQA needs a Hugging Face account that has accepted its terms.
set -euo pipefail
export HF_ALLOW_CODE_EVAL=1  # HumanEval and MBPP run the code that the model writes: use a container
run="${LAUNCH:-python} -m dkv.lm_eval --model dkv --batch_size 8 --device ${DEVICE:-cuda}"

instruct="$run --apply_chat_template --num_fewshot 0"
llada=pretrained=GSAI-ML/LLaDA-8B-Instruct,policy=Decode,refresh_interval=8
$instruct --model_args $llada,gen_length=256,block_length=32 --tasks gsm8k_cot_zeroshot
$instruct --model_args $llada,gen_length=256,block_length=64 --tasks minerva_math500
$instruct --model_args $llada,gen_length=128,block_length=64 --tasks gpqa_main_cot_zeroshot
$instruct --model_args $llada,gen_length=512,block_length=32 --tasks humaneval_instruct --confirm_run_unsafe_code
$instruct --model_args $llada,gen_length=512,block_length=32 --tasks mbpp_instruct --confirm_run_unsafe_code

base="$run --trust_remote_code"
dream=pretrained=Dream-org/Dream-v0-Base-7B,add_bos_token=True,policy=Decode,refresh_interval=4,shift=un,top_p=0.95
$base --model_args $dream,gen_length=256,temperature=0.0 --tasks gsm8k_cot --num_fewshot 8
$base --model_args $dream,gen_length=512,temperature=0.0 --tasks minerva_math500 --num_fewshot 4
$base --model_args $dream,gen_length=128,temperature=0.0 --tasks gpqa_main_generative_n_shot --num_fewshot 5
$base --model_args $dream,gen_length=512,temperature=0.2 --tasks humaneval --confirm_run_unsafe_code
$base --model_args $dream,gen_length=512,temperature=0.2 --tasks mbpp --num_fewshot 3 --confirm_run_unsafe_code
