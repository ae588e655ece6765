/* The library's entry: registers the operators, under settings, with the sessions that ask for it. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "operator.h"

/* ONNX Runtime never says when it needs a registration no more: it is kept for good, and serves all sessions that have
 * the same settings. */
struct registration {
  struct pmpd_settings settings;
  struct ort_domain *domain;
  struct registration *next;
  char session[]; /* settings.session */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct registration *registrations;

/* Make a registration, the first of the list. */
static struct ort_status *add_registration(const union ort_api *api, const char *session, int accuracy,
                                           uint32_t features) {
  struct registration *made = calloc(1, sizeof *made + strlen(session) + 1);
  if (!made) return pmpd_no_memory(api);
  made->settings = (struct pmpd_settings){
      .matmul = {pmpd_bitplane_matmul, &made->settings},
      .attention = {pmpd_group_query_attention, &made->settings},
      .api = api,
      .session = strcpy(made->session, session),
      .accuracy = accuracy,
      .features = features,
      .choice = pmpd_choose(features),
  };
  made->next = registrations;
  struct ort_status *status = api->CreateCustomOpDomain("pmpd", &made->domain);
  if (!status) status = api->CustomOpDomain_Add(made->domain, &made->settings.matmul.op);
  if (!status) status = api->CustomOpDomain_Add(made->domain, &made->settings.attention.op);
  if (status)
    free(made);
  else
    registrations = made;
  return status;
}

/* Find or make the registration with these settings, and give it to the session. */
static struct ort_status *give(struct ort_session_options *options, const union ort_api *api, const char *session,
                               int accuracy, uint32_t features) {
  struct registration *found = registrations;
  while (found && (found->settings.accuracy != accuracy || found->settings.features != features ||
                   strcmp(found->session, session)))
    found = found->next;
  if (!found) {
    TRY(add_registration(api, session, accuracy, features));
    found = registrations;
  }
  return api->AddCustomOpDomain(options, found->domain);
}

/* *text is the entry's value, or "", in memory of its own. */
static struct ort_status *config_entry(const union ort_api *api, const struct ort_session_options *options,
                                       const char *key, char **text) {
  int given;
  size_t size = 1;
  TRY(api->HasSessionConfigEntry(options, key, &given));
  if (given) TRY(api->GetSessionConfigEntry(options, key, NULL, &size));
  *text = calloc(size, 1);
  if (!*text) return pmpd_no_memory(api);
  struct ort_status *status = given ? api->GetSessionConfigEntry(options, key, *text, &size) : NULL;
  if (status) free(*text);
  return status;
}

static struct ort_status *unknown(const union ort_api *api, const char *what, const char *value, const char *choices) {
  char message[512];
  snprintf(message, sizeof message, "%s is '%.64s': choose one of %s", what, value, choices);
  return api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

static struct ort_status *unknown_level(const union ort_api *api) {
  char choices[256];
  size_t length = 0;
  for (int i = 0; i < pmpd_level_count; i++)
    length += (size_t)snprintf(choices + length, sizeof choices - length, "%s%s", i ? ", " : "", pmpd_levels[i].name);
  return unknown(api, "environment variable PMPD_MAX_ISA", getenv("PMPD_MAX_ISA"), choices);
}

static struct ort_status *read_accuracy(const union ort_api *api, const struct ort_session_options *options,
                                        int *accuracy) {
  char *text;
  TRY(config_entry(api, options, "pmpd.accuracy", &text));
  *accuracy = strcmp(text, "int8") ? PMPD_EXACT : PMPD_INT8;
  struct ort_status *status = NULL;
  if (*accuracy == PMPD_EXACT && *text && strcmp(text, "exact"))
    status = unknown(api, "session config entry pmpd.accuracy", text, "exact, int8");
  free(text);
  return status;
}

/* ONNX Runtime calls this with the options of a session that is given the library. Two entries of the session's
 * configuration are settings: pmpd.accuracy, exact (the default) or int8, and pmpd.session, the tag of its reports. */
PMPD_EXPORT struct ort_status *RegisterCustomOps(struct ort_session_options *options,
                                                 const struct ort_api_base *base) {
  const union ort_api *api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    char message[128];
    snprintf(message, sizeof message, "the pmpd operators need ONNX Runtime 1.%d or later, this is %.32s",
             ORT_API_VERSION, base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message);
  }
  const int level = pmpd_highest_level();
  if (level < 0) return unknown_level(api);
  int accuracy;
  char *session;
  TRY(read_accuracy(api, options, &accuracy));
  TRY(config_entry(api, options, "pmpd.session", &session));
  pthread_mutex_lock(&lock);
  struct ort_status *status = give(options, api, session, accuracy, pmpd_features(level));
  pthread_mutex_unlock(&lock);
  free(session);
  return status;
}
