// What llama.cpp makes of a text: tokens, the text of these, and the probabilities of what follows each of them.
//     node evaluate.mjs FOLDER MODEL.gguf ADAPTER.gguf|"" TEXT OUT.json
// FOLDER is that of tools/get_llama_cpp.sh.
import {writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [folder, modelPath, lora, text, out] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(`${folder}/node_modules/node-llama-cpp/dist/index.js`));
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath});
const tokens = model.tokenize(text);
const exact = {flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const context = await model.createContext({contextSize: 256, ...exact, ...(lora ? {lora} : {})});
const inputs = tokens.map((token) => [token, {generateNext: {probabilities: true}}]);
const outputs = await context.getSequence().controlledEvaluate(inputs);
const probabilities = outputs.map(({next}) => Array.from({length: next.probabilities.size}, (_, token) => next.probabilities.get(token)));
writeFileSync(out, JSON.stringify({tokens, back: model.detokenize(tokens), probabilities}));
process.exit(0);
