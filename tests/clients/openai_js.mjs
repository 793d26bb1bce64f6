// The official JavaScript client; see openai_python.py.
import assert from "node:assert/strict";
import OpenAI from "openai";

const { SAQQARA_CLIENT_URL: url, SAQQARA_CLIENT_KEY: apiKey, SAQQARA_CLIENT_MODEL: model } = process.env;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "Where is the oldest step pyramid?" }];

const checks = {
  async models() {
    const ids = [];
    for await (const found of client.models.list()) ids.push(found.id);
    assert(ids.includes(model));
  },
  async "chat stream is the chat"() {
    const fixed = { model, messages, max_tokens: 24, temperature: 0 };
    const whole = await client.chat.completions.create(fixed);
    const stream = await client.chat.completions.create({ ...fixed, stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, whole.choices[0].message.content);
    assert(text.length > 0);
  },
  async "chat helper"() {
    const runner = client.chat.completions.stream({ model, messages, max_tokens: 8 });
    const final = await runner.finalChatCompletion();
    assert.equal(final.choices[0].message.role, "assistant");
  },
  async completion() {
    const answer = await client.completions.create({ model, prompt: "Saqqara is", max_tokens: 5 });
    assert(answer.usage.completion_tokens <= 5);
  },
  async "tools required"() {
    const parameters = { type: "object", properties: { page: { enum: ["map", "index"] } }, required: ["page"] };
    const tools = [{ type: "function", function: { name: "look_up", parameters } }];
    const answer = await client.chat.completions.create({ model, messages, tools, tool_choice: "required", max_tokens: 200 });
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(call.function.name, "look_up");
    assert(["map", "index"].includes(JSON.parse(call.function.arguments).page));
  },
  async responses() {
    const answer = await client.responses.create({ model, input: "Hello", max_output_tokens: 16, store: false });
    assert(answer.output_text.length > 0);
  },
  async "errors have their types"() {
    await assert.rejects(client.chat.completions.create({ model, messages, temperature: -1 }), OpenAI.BadRequestError);
    const wrong = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}: ${String(error).slice(0, 300).replaceAll("\n", " ")}`);
  }
}
process.exit(failed ? 1 : 0);
