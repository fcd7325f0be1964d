import sys, time, torch, traceback, json, os
torch.manual_seed(0)
from transformers import LlamaConfig, Qwen3Config, Qwen2Config, AutoModelForCausalLM
import tri_mpk
from tri_mpk.loading import random_model
from tri_mpk.geometries import geometry, weight_bytes
dev=torch.device('cuda',0)
what=sys.argv[1]
def rel(a,b): return ((a.float()-b.float()).norm()/b.float().norm()).item()
if what=='small':
    base=dict(max_position_embeddings=1024,vocab_size=1001)
    cfgs={'llama':LlamaConfig(hidden_size=256,intermediate_size=704,num_hidden_layers=3,num_attention_heads=8,num_key_value_heads=2,head_dim=32,**base),
     'qwen3':Qwen3Config(hidden_size=320,intermediate_size=520,num_hidden_layers=2,num_attention_heads=6,num_key_value_heads=3,head_dim=128,tie_word_embeddings=True,**base),
     'qwen2odd':Qwen2Config(hidden_size=140,intermediate_size=300,num_hidden_layers=2,num_attention_heads=7,num_key_value_heads=1,**base)}
    cfgs.pop('qwen2odd'); cfgs['qwen2']=Qwen2Config(hidden_size=336,intermediate_size=300,num_hidden_layers=2,num_attention_heads=7,num_key_value_heads=1,**base)
    for n,c in cfgs.items():
        for dt in (torch.float32,torch.bfloat16):
            try:
                hf=random_model(c,0,dt,dev)
                ids=torch.randint(0,1001,(1,300),device=dev)
                ref_dt=hf(ids).logits
                hf32=random_model(c,0,dt,dev).float(); ref=hf32(ids).logits
                gen=hf32.generate(ids[:,:20],max_new_tokens=20,do_sample=False)
                t=time.time(); m=tri_mpk.from_model(hf,max_seq_len=512,wait_bound_s=2.0,progress=False); m.compile(); tc=time.time()-t
                t=time.time(); lg=m(ids).logits; t=time.time()-t
                lg2=m(ids).logits
                g=m.generate(ids[:,:20],max_new_tokens=20)
                print(n,dt,f'compile {tc:.1f}s run {t*1e3/300:.3f} ms/tok ours {rel(lg,ref):.2e} hf {rel(ref_dt,ref):.2e} same bits {torch.equal(lg,lg2)} greedy equal {(g==gen).float().mean().item():.2f} regs {m.kernel.runtime.compiled.n_regs} spills {m.kernel.runtime.compiled.n_spills}',flush=True)
            except Exception as e: traceback.print_exc(); print(n,dt,'FAIL',repr(e)[:300],flush=True)
else:
    from tri_mpk.benchmark import measure, fill_cache
    c=geometry(what)
    t=time.time(); m=tri_mpk.from_config(c,device=dev,max_seq_len=4352,wait_bound_s=2.0,progress=False); print('load',time.time()-t)
    t=time.time(); m.compile(); print('compile',time.time()-t, 'plan', m.kernel.program.seconds, m.kernel.program.report, 'regs',m.kernel.runtime.compiled.n_regs,m.kernel.runtime.compiled.n_spills)
    fill_cache(m)
    for ctx in (64,512,4096):
        r=measure(m,ctx); print(what,ctx,{k:round(v,4) for k,v in r.items()}, f"{weight_bytes(c)/r['ms_p50']/1e9:.2f} TB/s",flush=True)
    if len(sys.argv)>2:
        hf=random_model(c,0,torch.bfloat16,dev); ids=torch.randint(0,1000,(1,64),device=dev)
        a=hf(ids).logits; lg=m(ids).logits; ref=hf.float()(ids).logits
        print('ours',rel(lg,ref),'hf bf16',rel(a,ref), 'bits', torch.equal(lg,m(ids).logits))
